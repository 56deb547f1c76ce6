"""What a run prints before it reads any weight: what will be trained, where, and the memory plan."""

from __future__ import annotations

from accessory.blueprint import Blueprint
from accessory.config import FinetuneConfig
from accessory.data.corpus import Corpus
from accessory.memory.limit import check_limit
from accessory.memory.plan import StepMemory, device_memory, parameter_counts
from accessory.memory.recompute import choose_layers
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.parallel.agree import together
from accessory.run.identity import Job
from accessory.run.teacher import MadeTeacher


def preview(
    job: Job, decoder: Decoder, attachment: Attachment, teacher: MadeTeacher | None = None
) -> tuple[int, list[str]]:
    """(how many layers to recompute, what to tell the user), for a decoder on meta. A collective.

    Raises `ConfigError` for a `--checkpointing` that cannot be, and for a step that `--max_memory` forbids.
    """
    config, layout, blueprint, order = job.config, job.layout, job.blueprint, job.order
    longest, limit = min(config.max_words, order.most_tokens), config.max_memory_bytes

    def step_with(optim: str = config.optim, **smaller: int) -> StepMemory:
        """What a step would hold in memory with these settings instead of the run's."""
        return StepMemory(
            decoder, attachment, layout, tokens=longest if smaller else order.most_tokens,
            longest=longest,
            micro_batches=2 if job.accumulates or smaller else 1,  # only whether gradients are accumulated
            data_parallel=config.data_parallel, optim=optim, offload=config.offload_inputs,
            teacher=(teacher.decoder, teacher.shared) if teacher else None,
            seen=(blueprint.vision, min(job.pictures, 1) if smaller else job.pictures) if blueprint.vision else None,
        )  # fmt: skip

    step, n_layers = step_with(), sum(1 for _ in decoder.blocks())
    recomputed, why = choose_layers(config.checkpointing, n_layers, step.plan, layout, config.remedies, limit)
    if limit:
        smaller = job.smallest_step
        changes = [{"optim": "adamw8bit"}, smaller, smaller | {"optim": "adamw8bit"}]
        together(check_limit, limit, recomputed, step_with, changes)
    trained, total = parameter_counts(decoder, attachment)
    packed = blueprint.quant_type
    aimed = " ".join(blueprint.quant_targets)
    where = f"the blocks' {aimed} linears" if aimed else "the blocks"
    stored = f"{packed} in {where}, {config.precision} elsewhere" if packed else config.precision
    notes = [
        f"{blueprint.llama_type} on {layout.world_size} x {layout.device.type}: model parallel {layout.mp_size}, data "
        f"parallel {layout.dp_size} ({config.data_parallel}); weights in {stored}",
        f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.3f} %)",
        *blueprint.notes,
        *(teacher.lines() if teacher else ()),
    ]
    if config.pretrained_type:
        notes.append(f"--pretrained_type {config.pretrained_type} is needless: formats are recognised from the files")
    if config.checkpointing not in ("none", 0):
        moved = ", their inputs kept in host memory" if config.offload_inputs else ""
        notes.append(f"recomputed layers: {recomputed} of {n_layers}{f' ({why})' if why else ''}{moved}")
    if config.optim == "paged_adamw" and layout.device.type == "cpu":
        notes.append("--optim paged_adamw is adamw on the CPU: there is no smaller memory to page out of")
    title = f"a micro-batch of {order.most_tokens:,} tokens (the most there can be)"
    return recomputed, [*notes, step.plan(recomputed).table(title, device_memory(layout.device))]


def corpus_notes(config: FinetuneConfig, blueprint: Blueprint, corpus: Corpus) -> list[str]:
    """The report on the data, and what the model will not see of them. Raises `DataError` for too long a document."""
    args = blueprint.args
    data = ", ".join(map(str, config.data_config))
    notes = [
        *corpus.check_lengths(args.longest_document, args.stated_length),
        f"data {data}: {corpus.report}\nfirst document, what is learned between « »:\n{corpus.show(0)}",
    ]
    if unheld := corpus.without(config.new_tokens):
        notes.append(f"--new_tokens: no document holds {', '.join(unheld)}")
    return notes
