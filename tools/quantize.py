"""Pack a base once, so that later starts neither read nor pack its full weights:

python tools/quantize.py BASE TARGET --quant_type nf4       or, for transformers + bitsandbytes:  ... --to hf
python tools/quantize.py BASE TARGET --quant_type int4_g128 --to gptq    or awq, for transformers + gptqmodel
python tools/quantize.py BASE TARGET --quant_type mix2.5 --calibrate alpaca.json    two to four bits, fitted to text
(also with --to gptq or awq)
"""

import json as json_module
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.checkpoint.whole import WholeModel
from accessory.entry import from_command_line, run_tool
from accessory.errors import CheckpointError, ConfigError, check_known
from accessory.eval.perplexity import perplexity as perplexity_of
from accessory.export import Destination, calibrated, open_base
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.parallel.groups import Layout
from accessory.quant import QUANT_TYPES
from accessory.quantizer.settings import Settings


def main(
    base: str,
    target: str,
    quant_type: str = "nf4",
    to: str = "accessory",
    dtype: str = "bf16",
    calibrate: str = "",
    rows: int = Settings.rows,
    own_rows: int = Settings.own_rows,
    row_tokens: int = Settings.row_tokens,
    batch: int = Settings.batch,
    epochs: int = Settings.epochs,
    distill_steps: int = Settings.distill_steps,
    distill_batch: int = Settings.distill_batch,
    seed: int = Settings.seed,
    perplexity: str = "",
    seq: int = 1024,
    windows: int | None = None,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Write BASE as the new directory TARGET with the linears of all blocks packed.

    With --calibrate it takes minutes, or hours for a large model, a block at a time; stopped and started again, it goes
    on. Under torchrun, processes divide the text.

    Args:
        base: any full-precision checkpoint that --pretrained_path takes.
        target: a new directory.
        quant_type: a format, as --quant_type of training; one that bitsandbytes has for --to hf; with --calibrate
            intB_gG (B of 2, 3, 4; G of 32, 64, 128), or mix2.2, mix2.5, mix3.0, which mix 2 and 4 bits.
        to: accessory, or what transformers loads: hf (bitsandbytes' layout), gptq or awq; or greenbit. With --calibrate
            accessory, or gptq or awq, whose zero points are whole, so that the model has such while it is fitted.
        dtype: of embedding, head and norms.
        calibrate: a data file (JSON, JSONL, text, ...) by whose texts the weights are fitted; absent: by no text.
        rows: how many pieces of it, drawn from all over the file.
        own_rows: how many pieces beside them that BASE writes itself, drawn by its probabilities.
        row_tokens: tokens of each piece.
        batch: pieces of an optimizer step.
        epochs: passes over the pieces for each block; 0: error feedback (GPTQ) alone.
        distill_steps: steps of the last pass, over scales and zeros of the whole model; 0: none.
        distill_batch: pieces of one of these steps.
        seed: of the pieces, and of their order.
        perplexity: a text file whose perplexity is measured before and after.
        seq: tokens of its windows.
        windows: how many of them, from its start; absent: all.
        device: auto, cpu or cuda, for --calibrate.
        json: print all figures as JSON in the last line.
    """
    source, folder = Path(str(base)), Path(str(target))
    if not calibrate:
        _refuse_alone(perplexity=perplexity, json=json)
        check_known("--quant_type", quant_type, QUANT_TYPES)
        model = _full(source)
        Destination(to, dtype, quant_type=quant_type).write(model, folder)
        print(f"{base} -> {target} ({quant_type}, {to})")
        return
    destination = Destination(to, dtype)
    settings = Settings(quant_type, rows, own_rows, row_tokens, batch, epochs, distill_steps, distill_batch, seed)
    layout = groups.start(str(device))
    say = print if layout.is_main else _nothing
    measured = (perplexity, seq, windows) if perplexity else None
    before = _perplexity(source, layout, *measured) if measured else None
    figures = calibrated(_full(source), source, folder, Path(str(calibrate)), settings, destination, layout, say)
    if measured:
        figures |= {
            "text": str(perplexity),
            "text_before": before,
            "text_after": _perplexity(folder, layout, *measured),
        }
    say(_summary(figures))
    if json:
        say(json_module.dumps(figures))


def _full(base: Path) -> WholeModel:
    model, sources = open_base([base])
    if packed := next((source.storage_names for source in sources if source.storage), None):
        raise CheckpointError(f"{base}: is packed as {packed} already; packing it again would lose more.")
    return model


def _refuse_alone(**flags: object) -> None:
    if given := [f"--{name}" for name, value in flags.items() if value]:
        raise ConfigError(f"{given[0]} goes with --calibrate DATA: give that too, or leave {given[0]} out.")


def _perplexity(path: Path, layout: Layout, text: str, seq: int, windows: int | None) -> float:
    model = MetaModel.from_pretrained(path, layout=layout, max_seq_len=seq)
    return perplexity_of(model, Path(text).read_text(encoding="utf-8"), seq, windows).perplexity


def _summary(figures: dict[str, Any]) -> str:
    """Figures of the whole, as lines."""
    lines = [
        f"{figures['base']} -> {figures['target']} ({figures['quant_type']}, {figures['bits']:.3f} bits a weight) "
        f"in {figures['seconds']:.0f} s",
        f"perplexity of calibration text held out: {figures['perplexity_full']:.2f} in full, "
        f"{figures['perplexity_blocks']:.2f} by blocks, {figures['perplexity']:.2f} at last",
    ]
    if "text" in figures:
        lines.append(
            f"perplexity of {figures['text']}: {figures['text_before']:.2f} before, {figures['text_after']:.2f} after"
        )
    return "\n".join(lines)


def _nothing(line: str) -> None:
    """What ranks but the first say."""


if __name__ == "__main__":
    run_tool(from_command_line(main))
