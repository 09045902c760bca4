"""The fullest moments of a stage's forward and backward pass over microbatches of full size.

Every `Moment` is one point of the pass through the deepest layer of the stage, where everything
that was kept for backward is still there: it lists what is kept, what backward has freed since, and
what it holds in passing. A stage's peak is the largest of them. Of tensors that live through a
whole pass only those that grow with tokens or vocabulary are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from proma_megatron.config.constants import LOGPROB_CHUNK
from proma_megatron.config.run import RunConfig
from proma_megatron.planning.activations import final_norm_kept, kept_by_layer, norm_backward
from proma_megatron.planning.counts import Counts
from proma_megatron.planning.quantized import in_fp8, weight_copies
from proma_megatron.planning.shapes import EMBEDDING, HEAD, Local, Stage
from proma_megatron.planning.sizes import Sizes
from proma_megatron.planning.workspace import (
    Group,
    LookupWorkspace,
    is_projected,
    passing_slices,
    slices_of,
)


@dataclass(frozen=True)
class Moment:
    """Bytes at one point of a step, beyond what is resident."""

    name: str
    activations: int = 0
    logits: int = 0
    workspace: int = 0
    kv_cache: int = 0
    fp8_weights: int = 0  # copies, which stay while gradients are computed and weights updated

    @property
    def total(self) -> int:
        passing = self.activations + self.logits + self.workspace + self.kv_cache
        return passing + self.fp8_weights


def in_flight(config: RunConfig, counts: Counts, stage: int) -> int:
    """Return the most forward passes of a model chunk that wait for their backward at one time.

    1F1B warms up with one forward pass a later stage; interleaved, with two, and with a pass of
    every earlier chunk for as many microbatches as there are stages.
    """
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    if virtual is None:
        return min(pipeline - stage, counts.microbatches)
    warm_up = 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline
    return min(warm_up + 1, counts.microbatches * virtual)


def training_moments(
    config: RunConfig, stage: Stage, sizes: Sizes, counts: Counts
) -> tuple[Moment, ...]:
    """Return the candidates for this stage's peak while gradients are computed."""
    copies = weight_copies(config, stage)
    found = _Pass(config, stage, sizes, counts).moments()
    return tuple(replace(moment, fp8_weights=copies) for moment in found)


class _Pass:
    """One microbatch's way through a stage, on top of those that wait."""

    def __init__(self, config: RunConfig, stage: Stage, sizes: Sizes, counts: Counts) -> None:
        self.config, self.stage, self.sizes = config, stage, sizes
        self.microbatches = counts.microbatches
        self.projects = config.projects and (
            counts.microbatches > 1 or config.projection.acts_alone
        )
        self.acts_alone = config.projection.acts_alone
        self.layer = kept_by_layer(sizes)
        skipped = kept_by_layer(sizes.in_compute_dtype)
        self.more_if_skipped = max(0, skipped.total - self.layer.total)
        self.recomputes = config.model.recompute == "full"
        self.widened = sizes.precision.wide > sizes.precision.compute
        waiting = in_flight(config, counts, stage.index)
        self.earlier = (waiting - 1) * self._kept_by_chunk()
        if config.parallel.pipeline > 1:
            self.earlier += 2 * sizes.stream  # a gradient and an input that have just arrived
        if sizes.sharded_sequence:
            self.earlier += sizes.gathered  # Megatron's buffer for gathered sequences
        self.kept, self.scratch = self._resident() if config.projects else (0, 0)

    # ------------------------------------------------------------------ what is kept

    def _kept_by_chunk(self) -> int:
        """Return bytes that one forward pass of a chunk keeps, final norm and logits apart."""
        sizes, layers = self.sizes, self.stage.layers_per_chunk
        parallel = self.config.parallel
        inner = parallel.pipeline > 1 and (parallel.virtual_pipeline or 1) > 1
        ends = int(inner or not self.stage.first) + int(inner or not self.stage.last)
        if self.recomputes:
            # Each layer's input; the last output is kept for the norm that reads it, or to send.
            last = int(not self.widened or inner or not self.stage.last)
            return (layers + last) * sizes.stream
        kept = layers * self.layer.total + self._skipped * self.more_if_skipped
        # Without a widened copy inputs and outputs are the residual.
        return kept + (ends if self.widened else 1) * sizes.stream

    @property
    def _skipped(self) -> int:
        """Layers of one of this stage's chunks that stay out of FP8, at most."""
        return max(
            sum(not in_fp8(self.config, layer) for layer in {w.layer for w in chunk} - {None})
            for chunk in self.stage.chunks
        )

    @property
    def _all(self) -> int:
        """Everything kept when backward enters the deepest layer."""
        kept = self.earlier + self._kept_by_chunk()
        if self.recomputes:
            # That layer again, with its output.
            kept += self.layer.total + bool(self._skipped) * self.more_if_skipped
            kept += self.sizes.stream
        return kept

    # ------------------------------------------------------------------ moments

    def moments(self) -> Iterator[Moment]:
        held = self._head_held() if self.stage.last else 0
        if self.stage.last:
            yield from self._loss_moments(held)
        yield from self._layer_moments(held)
        if self.stage.first:
            yield from self._embedding_moments(held)

    def _held_earlier(self) -> int:
        """Return what earlier microbatches hold of `_head_held` when the newest's loss is taken."""
        if not self._head_held() or self.config.parallel.pipeline == 1:
            return 0
        one = self.sizes.logits + self.sizes.gathered
        return one * min(self.microbatches - 1, self._lag + 1)

    @property
    def _lag(self) -> int:
        """Microbatches that the first stage may be behind the last: TiedEnds.lag."""
        parallel = self.config.parallel
        return parallel.pipeline * (2 if parallel.virtual_pipeline else 1)

    # ------------------------------------------------------------------ the workspace

    def _resident(self) -> tuple[int, int]:
        """Return bytes of the workspace that stay from the first microbatch that needs them."""
        fc1, fc2, qkv, proj = self._weights()
        layer = [fc2, fc1, proj, qkv]
        groups = [self._group([*self._before_layer(), *layer])]
        table = self.stage.find(EMBEDDING)
        tied = self.config.model.tie_embeddings
        lookup = 0
        if self.stage.last and not (tied and self.config.parallel.pipeline == 1):
            groups.append(self._group([self._head()], lookup=tied))
        if table is not None and not tied:
            lookup = self._lookup(table).scratch
        elif table is not None and self.config.parallel.pipeline == 1:
            groups.append(self._embedding_group(table))
        kept = max(group.materialized for group in groups)
        return kept, max(lookup, *(group.scratch for group in groups))

    def _before_layer(self) -> list[Local]:
        """Return the head, where it waits for the deepest layer to save a sum over tensor ranks."""
        if not self.stage.last or self.config.model.tie_embeddings or self.sizes.tensor == 1:
            return []
        head = self._head()
        return [head] if self._fits([head], self._weights()) else []

    def _embedding_group(self, table: Local) -> Group:
        """Return a tied table's group, alone or with the first layer."""
        fc1, fc2, qkv, proj = self._weights()
        layer = [fc2, fc1, proj, qkv]
        if self.sizes.tensor == 1 or not self._fits(layer, [table]):
            return self._group([table], lookup=True)
        group = self._group(layer)
        group.add(table, lookup=True)
        return group

    def _fits(self, before: Sequence[Local], after: Sequence[Local]) -> bool:
        """Tell whether a group can wait for another one."""
        group = self._group(list(before))
        slices = slices_of(self.config, self.sizes)
        size = slices * sum(w.count for w in after) * self.sizes.precision.gradient
        return group.held + group.materialized + size <= group.half

    @property
    def _was(self) -> tuple[int, int]:
        """How large the workspace is already when the fullest pass comes."""
        # By PROMA's rules the first microbatch only has plain GEMMs.
        kept = self.microbatches > 2 or (self.acts_alone and self.microbatches > 1)
        return (self.kept if kept else 0, self.scratch if self.microbatches > 1 else 0)

    def _head(self) -> Local:
        """Return the head's weight: its own, or the embedding's."""
        head = self.stage.find(HEAD) or self.stage.find(EMBEDDING)
        assert head is not None
        return head

    def _head_held(self) -> int:
        """Return bytes of logits' gradients, and the head's input, that wait for a tied embedding.

        In one stage that is within the same microbatch; over stages the last one holds as many as
        the first may be behind.
        """
        model, parallel = self.config.model, self.config.parallel
        if not (model.tie_embeddings and self.config.projects):
            return 0
        one = self.sizes.logits + self.sizes.gathered
        if parallel.pipeline == 1:
            return one
        return one * min(self.microbatches, self._lag + 1)

    def _loss_moments(self, held: int) -> Iterator[Moment]:
        sizes, e, wide = self.sizes, self.sizes.precision.compute, self.sizes.precision.wide
        single, parallel = sizes.tokens <= LOGPROB_CHUNK, self.config.parallel
        kept = self.earlier + self._kept_by_chunk() + final_norm_kept(sizes)
        earlier, waiting = self._held_earlier(), sum(self._was)
        chunk = min(sizes.tokens, LOGPROB_CHUNK) * sizes.vocab * wide
        yield Moment("loss, forward", kept, earlier + sizes.logits + 4 * chunk, waiting)
        chunks = 2 if single else (4 if wide > e else 3)
        logits = earlier + 2 * sizes.logits + chunks * chunk
        yield Moment("loss, backward", kept, logits, waiting)
        kept += sizes.gathered  # gradient of the head's input
        tied = self.config.model.tie_embeddings
        head = self._head()
        if not self.config.projects:
            yield Moment("head, backward", kept, sizes.logits, head.count * e)
        elif not tied:
            group = self._group([head])
            copied = sizes.logits if wide > e else 0
            yield Moment("head, backward", kept, copied, group.beside(*self._was))
            if not self._before_layer():
                kept = self._all + sizes.stream + sizes.tokens * sizes.ffn * e
                yield Moment("head, solve", kept, 0, group.peak(*self._was))
        elif parallel.pipeline > 1:
            group = self._group([head], lookup=True)
            yield Moment("head, solve", kept, held, group.peak(*self._was))
        norm = norm_backward(sizes, sizes.own_tokens * sizes.hidden)
        kept = self.earlier + self._kept_by_chunk() + norm + 2 * sizes.stream
        kept += sizes.own_tokens * sizes.hidden * wide if wide > e else 0
        pending = 0
        if self.config.projects:
            pending = self._waiting([] if tied else [head])
        elif not self.config.projects and tied and parallel.pipeline == 1:
            pending = head.count * e
        yield Moment("final norm, backward", kept, held, pending)

    def _layer_moments(self, held: int) -> Iterator[Moment]:
        """Yield the backward of the deepest layer, from the MLP's output to its input."""
        layer, sizes, e = self.layer, self.sizes, self.sizes.precision.compute
        ffn, stream = sizes.tokens * sizes.ffn * e, sizes.stream
        gathered = sizes.gathered if sizes.sharded_sequence else 0
        tied = self._tied_gradient()
        fc1, fc2, _, proj = self._weights()

        def work(*weights: Local) -> int:
            """Return what has been captured so far, or the gradient of the last of these."""
            if self.config.projects:
                return self._group([*self._before_layer(), *weights]).beside(*self._was)
            return tied + weights[-1].count * e

        kept = self._all
        yield Moment("fc2, backward", kept + stream + gathered + ffn, held, work(fc2))
        passing = 0 if self.config.projects else tied
        captured = self._waiting([fc2]) if self.config.projects else passing
        kept -= layer.fc2_input
        yield Moment("SwiGLU, backward", kept + stream + 3 * ffn, held, captured)
        kept -= layer.mlp - layer.fc2_input
        dx = sizes.tokens * sizes.hidden * e
        yield Moment("fc1, backward", kept + stream + dx + 2 * ffn, held, work(fc2, fc1))
        captured = self._waiting([fc2, fc1]) if self.config.projects else passing
        norm = norm_backward(sizes, sizes.own_tokens * sizes.hidden)
        yield Moment("MLP norm, backward", kept - stream + norm + 2 * stream, held, captured)
        kept -= layer.mlp_norm + layer.proj_input
        captured = self._waiting([fc2, fc1, proj]) if self.config.projects else passing
        rows = sizes.dense_tokens * sizes.query * e
        yield Moment("attention, backward", kept + stream + 4 * rows, held, captured)
        if sizes.qk_norm:
            kept -= layer.dense + layer.rotary
            gradients = sizes.tokens * sizes.qkv * e
            norm = norm_backward(sizes, sizes.tokens * sizes.query)
            kept += stream + gradients + norm
            yield Moment("query norm, backward", kept, held, captured)
        if self.config.projects:
            yield self._solve_moment(held)

    def _waiting(self, weights: list[Local]) -> int:
        """Return what these hold when they have been handed over, and nothing else is."""
        group = self._group(weights)
        return group.beside(*self._was) - group.passing

    def _solve_moment(self, held: int) -> Moment:
        """Return when a layer is solved: the layer before it hands over its first gradient."""
        sizes, e = self.sizes, self.sizes.precision.compute
        fc1, fc2, qkv, proj = self._weights()
        group = self._group([*self._before_layer(), fc2, fc1, proj, qkv])
        kept = self._all - self.layer.total + sizes.stream
        peak = group.peak(*self._was)
        if self.stage.layers_per_chunk == 1:
            return Moment("layer, solve", kept, held, peak)
        if self.recomputes:
            kept += self.layer.total - sizes.stream
        return Moment("layer, solve", kept + sizes.tokens * sizes.ffn * e, held, peak)

    def _embedding_moments(self, held: int) -> Iterator[Moment]:
        sizes, e = self.sizes, self.sizes.precision.compute
        table = self.stage.find(EMBEDDING)
        assert table is not None
        kept = self.earlier + 2 * sizes.gathered
        tied, stages = self.config.model.tie_embeddings, self.config.parallel.pipeline
        if not self.config.projects:
            copies = 2 if tied and stages == 1 else 1
            yield Moment("embedding, backward", kept, 0, copies * table.count * e)
        elif not tied:
            found, (was, scratch) = self._lookup(table), self._was
            workspace = was + max(scratch, found.scratch)
            yield Moment("embedding, backward", kept, 0, found.held + found.passing + workspace)
        elif stages == 1:
            group = self._embedding_group(table)
            yield Moment("embedding, backward", kept, held, group.beside(*self._was))
            yield Moment("embedding, solve", kept, held, group.peak(*self._was))

    # ------------------------------------------------------------------ weights

    def _tied_gradient(self) -> int:
        """Return the head's gradient of a tied table, kept until the embedding's is there."""
        parallel, model = self.config.parallel, self.config.model
        if self.config.projects or not model.tie_embeddings or parallel.pipeline > 1:
            return 0
        return self._head().count * self.sizes.precision.compute

    def _group(self, weights: list[Local], *, lookup: bool = False) -> Group:
        group = Group(self.sizes, self.config, self.projects)
        for weight in weights:
            group.add(weight, lookup=lookup)
        return group

    def _lookup(self, table: Local) -> LookupWorkspace:
        projects = self.projects and is_projected(table, self.config)
        slices = passing_slices(self.config, self.sizes)
        block = self._group([]).block
        return LookupWorkspace.of(self.sizes, table, block, slices if projects else 0)

    def _weights(self) -> tuple[Local, Local, Local, Local]:
        """Return fc1, fc2, qkv, proj."""
        by_name = {weight.name: weight for weight in self.stage.parameters}
        return (
            by_name["mlp.linear_fc1.weight"],
            by_name["mlp.linear_fc2.weight"],
            by_name["self_attention.linear_qkv.weight"],
            by_name["self_attention.linear_proj.weight"],
        )
