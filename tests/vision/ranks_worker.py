"""Run under torchrun on two ranks with a file of models, beside gradients that one process has computed of each."""

import json
import sys
from pathlib import Path

import torch
from fairscale.nn.model_parallel import destroy_model_parallel
from safetensors.torch import load_file

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory import MetaModel
from accessory.blueprint import make_blueprint
from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.run_record import with_base
from accessory.data.batch import Document
from accessory.parallel import groups
from accessory.parallel.data import DataParallel, reduce_gradients
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from tests.vision.seeing import documents, packed

MODELS = Path(sys.argv[1])
"""JSON: name -> some arguments of `MetaModel.from_pretrained`. Gradients lie beside it, in NAME-all and NAME-two."""


def check(name: str, given: dict, layout: Layout, mode: str, mine: slice, wanted: str) -> None:
    """The gradients of all that is trained, summed over the ranks, where this one computes `mine` of the documents."""
    config = [part if isinstance(part, dict) else Path(part) for part in given["llama_config"]]
    sources = with_base(given["pretrained_path"], given["vision_path"])
    blueprint = make_blueprint(
        sources, precision="fp32", train=True, llama_type=given["llama_type"], llama_config=config,
        tokenizer_path=Path(given["tokenizer_path"]),
    )  # fmt: skip
    decoder, attachment = blueprint.build(layout, mode)
    slicings = {target.name: target.slicing for target in targets(decoder)}
    data_parallel = DataParallel(layout, mode, blueprint.method.trains_base)
    fill(decoder, resolve(decoder, sources, attachment, initialize=True), attachment, layout, data_parallel)
    model = MetaModel(decoder, blueprint.tokenizer, 512)
    model.see(blueprint.vision, divides=layout.mp_size > 1)
    frozen = set(getattr(decoder, blueprint.vision.encoder).parameters())
    data_parallel.shard_root(model, whole=frozen)
    chosen: list[Document] = documents(blueprint.vision.place)[mine]
    computed = []
    encode = blueprint.vision.features
    blueprint.vision.features = lambda decoder, pixels: computed.append(len(pixels)) or encode(decoder, pixels)
    for batch in (packed(*chosen), packed(*chosen)):  # the second adds to the first one's gradients
        reduce_gradients(model, last=True)
        model(batch).backward()
    pictures = sum(len(each.insets) for each in chosen)
    share = (2, 1)[layout.mp_rank] if layout.mp_size > 1 else pictures  # of three
    assert sum(computed) == 2 * share, computed
    parameters = NamedParameters(dict(decoder.named_parameters()), slicings).only(attachment.trainable)
    parameters.sum_partial_gradients()
    expected = load_file(MODELS.parent / f"{name}-{wanted}.safetensors")
    found = dict(parameters.gathered({name: p.grad for name, p in parameters.items()}))
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        bound = 1e-5 * expected[key].abs().max().item()
        said = f"{name} {mode} {key}"
        torch.testing.assert_close(gradient, 2 * expected[key], rtol=1e-4, atol=2 * bound + 1e-7, msg=said)


models = json.loads(MODELS.read_text())
layout = groups.start("cpu", model_parallel_size=2)
for name, given in models.items():
    check(name, given, layout, "sdp", slice(0, 4), "all")
destroy_model_parallel()
layout = groups.start("cpu", model_parallel_size=1)
for name, given in models.items():
    for mode in ("sdp", "fsdp"):
        check(name, given, layout, mode, slice(layout.rank, layout.rank + 1), "two")
print("OK")
groups.stop()
