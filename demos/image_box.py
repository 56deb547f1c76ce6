"""The box of a page that an image is put into: chosen, dropped or pasted; it shows the square that the model sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio

from accessory.config import ImageConfig
from accessory.config.asking import STILL
from demos.sent_images import LARGE, MOST_IMAGE_BYTES

UNLISTED: dict[str, Any] = {"queue": False, "api_visibility": "undocumented", "show_progress": "hidden"}
"""Events of a page that are no questions, for gradio."""
_TEMPLATE = """
<label><input type="file" accept="image/jpeg,image/png,image/webp,image/gif" aria-label="Image">
<span>Drop an image here, paste one, or click to choose</span><img alt="The image, as the model sees it" hidden></label>
<button type="button" hidden>Remove the image</button>
"""
_STYLE = """
label { display: flex; align-items: center; justify-content: center; position: relative; min-height: 160px;
  border: 2px dashed var(--border-color-primary); border-radius: var(--radius-lg); cursor: pointer;
  background: var(--block-background-fill); color: var(--body-text-color-subdued); text-align: center; }
label:hover, label:focus-within { border-color: var(--color-accent); }
input { position: absolute; inset: 0; opacity: 0; cursor: pointer; }
span { padding: 1em; }
img { width: 224px; max-width: 100%; margin: 8px; border-radius: var(--radius-md); }
button { margin-top: 6px; padding: 0; border: none; background: none; font-size: var(--text-sm); cursor: pointer;
  color: var(--body-text-color-subdued); text-decoration: underline; }
[hidden] { display: none; }
"""
_SCRIPT = """
let chosen = null, offered = null, held = '';  // the file that is shown, the one being sent, and what the box holds
const [image, words, remove] = ['img', 'span', 'button'].map(name => element.querySelector(name));
const show = () => {
    const there = !!props.value;
    image.src = there ? props.value : '';
    image.hidden = remove.hidden = !there;
    words.hidden = there;
};
const send = value => { props.value = value; show(); trigger('look'); };
const read = file => {
    if (!file) return;
    if (file.size > MOST) { trigger('large'); return; }
    offered = file;
    const reader = new FileReader();
    reader.onload = () => { if (offered === file) send(reader.result); };
    reader.readAsDataURL(file);
};
element.addEventListener('change', event => { read(event.target.files[0]); event.target.value = ''; });
element.addEventListener('dragover', event => event.preventDefault());
element.addEventListener('drop', event => { event.preventDefault(); read(event.dataTransfer.files[0]); });
remove.addEventListener('click', () => { chosen = offered = null; held = ''; send(''); });
document.addEventListener('paste', event => {
    const file = [...event.clipboardData.files].find(file => file.type.startsWith('image/'));
    if (file) { event.preventDefault(); read(file); }
});
document.addEventListener('transformed', () => read(chosen));
watch('value', () => {
    if (props.value !== held) chosen = props.value ? offered : null;  // else it was refused, and the old one is back
    held = props.value;
    show();
});
show();
"""


class ImageBox:
    """The box, and the choice of a transform below it; made inside a page's Blocks."""

    def __init__(self, config: ImageConfig) -> None:
        self.image = gradio.HTML(
            "", html_template=_TEMPLATE, apply_default_css=False, container=True, css_template=_STYLE, elem_id="image",
            js_on_load=_SCRIPT.replace("MOST", str(MOST_IMAGE_BYTES)),
        )  # fmt: skip
        self.transform = gradio.Dropdown(
            list(STILL), value=config.image_transform, label="Image transform", elem_id="transform",
            info="padded_resize shows all of an image, between bars; resized_center_crop cuts it to its middle",
        )  # fmt: skip

    def on_look(self, look: Callable[..., str], kept: Callable[..., str]) -> Any:
        """Call `look` with what was put in, perhaps nothing, and the transform; the box then holds the data URL that it
        returns, or, where it raises, that of `kept`. Gives gradio's event.
        """
        # Unprocessed, so that `image_bytes` alone says what is wrong with a value.
        looking = self.image.look(
            look, [self.image, self.transform], self.image, api_name="look", preprocess=False, show_progress="hidden"
        )
        looking.failure(kept, outputs=self.image, **UNLISTED)
        self.image.large(_too_large, **UNLISTED | {"queue": True})  # gradio shows errors of events in the queue only
        self.transform.change(None, js="() => { document.dispatchEvent(new Event('transformed')); }", **UNLISTED)
        return looking


def _too_large() -> None:
    raise gradio.Error(LARGE, duration=5, print_exception=False)
