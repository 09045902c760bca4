"""What training does to sequences: microbatches, passes over them, one optimizer step a minibatch.

Every rank calls the same methods with the sequences of all replicas, and takes its share. An update
that is not finite is skipped on all of them; `nonfinite.py` says what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise

import torch

from proma_megatron.batching.aggregation import aggregate
from proma_megatron.batching.packing import (
    consecutive_microbatches,
    loss_tokens,
    pack,
    plan_microbatches,
)
from proma_megatron.config.run import RunConfig
from proma_megatron.learner.minibatch import MinibatchGradients, MinibatchPass, Plan, is_finite
from proma_megatron.learner.nonfinite import NonFiniteEvent, blame, offences
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.schedule import Sums, evaluate_logprobs, kl_estimate
from proma_megatron.losses.options import SUPERVISED, UNIT, LossOptions, aggregation, loss_options
from proma_megatron.model.policy import Policy
from proma_megatron.projection import diagnostics
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.diagnostics import Units
from proma_megatron.projection.fp8_gate import GateFigures
from proma_megatron.types import Microbatch, TrainingSequence


class Learner:
    """Passes and steps of one policy on this rank.

    Attributes:
        fp8: what the last `update` found about FP8 operands, if it compared.
        offences: what was to blame for the updates that the last `update` or `supervise` skipped,
            in all replicas, on every rank.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        accumulator: Accumulator | None = None,
        watch: Callable[[str], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Take over the training of a policy.

        Args:
            watch: what to enter for a part of a step, by its name.
        """
        self.config, self.policy, self.accumulator = config, policy, accumulator
        self.watch = watch
        self.loss = loss_options(config)
        self.offences: list[NonFiniteEvent] = []
        self.fp8: GateFigures | None = None

    # ------------------------------------------------------------------ steps

    def update(
        self,
        groups: Sequence[Sequence[TrainingSequence]],
        optimizer: Optimizer,
        kl: float,
        *,
        compares: bool = False,
    ) -> dict[str, float]:
        """Make one optimizer step per minibatch of groups; return what it was like.

        A minibatch whose update is not finite is skipped, counted in ``optimizer/skipped``, and
        leaves no trace in figures of updates. What only an update could tell is NaN, or missing,
        where all were skipped.

        Args:
            kl: coefficient of the penalty in the loss, if there is one.
            compares: of the first minibatch, compare a microbatch's FP8 operands with those before
                FP8; `fp8` says how they differ.
        """
        count = self.config.batching.minibatches
        size = len(groups) // count
        metrics: dict[str, float] = {}
        units: Units = {}
        sums, last = Sums(), None  # of the latest pass, and of the latest update
        self.offences, self.fp8, skipped = [], None, 0
        trained, clipped, tokens = 0, 0.0, 0.0
        for index in range(count):
            minibatch = [s for found in groups[index * size : (index + 1) * size] for s in found]
            found = self._gradients(minibatch, kl, compares=compares and index == 0)
            sums = found.sums
            clipped, tokens = clipped + sums.clipped, tokens + sums.tokens
            trained += sum(len(s.tokens) for s in self._kept(minibatch) if s.loss_tokens)
            if index == 0 and sums.tokens:  # still the policy that the rollouts came from
                metrics["policy/entropy"] = sums.entropy / sums.tokens
                if self.config.loss.mismatch == "off":  # else the generator's are replaced by now
                    metrics["policy/logprob_mismatch"] = sums.mismatch / sums.tokens
                    metrics["policy/logprob_mismatch_max"] = sums.worst_mismatch
            if not self._is_finite(found, index):
                metrics, skipped = optimizer.skip() | metrics, skipped + 1
                continue
            last = sums
            with self.watch("optimizer"):
                metrics |= optimizer.step()
            if self.accumulator is not None:
                mine = self.accumulator.tally.units()
                units = diagnostics.merge([units, diagnostics.gather(mine, self.policy.topology)])
        sums = last or sums
        metrics["optimizer/skipped"] = float(skipped)
        if self.loss.clips:
            metrics["loss/clipped"] = clipped / max(1, tokens)
        metrics["policy/kl_rollout"] = sums.kl / max(1, sums.tokens)
        metrics["loss/policy"] = -sums.objective
        metrics["tokens/trained"] = float(trained)
        if self.fp8 is not None:
            metrics |= self.fp8.metrics()
        return metrics | diagnostics.metrics(units)

    def gradients(self, minibatch: Sequence[TrainingSequence], kl: float = 0.0) -> Sums:
        """Compute reduced gradients of a minibatch in ``main_grad``; return all replicas' sums."""
        return self._gradients(minibatch, kl).sums

    def _gradients(
        self, minibatch: Sequence[TrainingSequence], kl: float, *, compares: bool = False
    ) -> MinibatchGradients:
        # What is dropped still counts in the denominator: dropping changes no plain gradient.
        weighted, denominator = aggregate(minibatch, *aggregation(self.config))
        loss = replace(self.loss, kl=kl)
        return self._accumulate(
            self._kept(weighted), denominator, loss, self.accumulator, compares=compares
        )

    def _kept(self, sequences: Sequence[TrainingSequence]) -> Sequence[TrainingSequence]:
        if self.config.batching.zero_advantage == "keep":
            return sequences
        return [sequence for sequence in sequences if sequence.advantage]

    def supervise(
        self, sequences: Sequence[TrainingSequence], optimizer: Optimizer
    ) -> dict[str, float]:
        """Make one optimizer step of cross-entropy on these sequences; return what it was like.

        It is skipped as by `update`.
        """
        self.offences = []
        found = self._accumulate(sequences, float(loss_tokens(sequences)), SUPERVISED, None, 1.0)
        finite = self._is_finite(found, 0)
        with self.watch("optimizer"):
            figures = optimizer.step() if finite else optimizer.skip()
        return {
            "loss/supervised": found.sums.surprise / found.sums.tokens,
            "optimizer/skipped": float(not finite),
            **figures,
        }

    def _is_finite(self, found: MinibatchGradients, minibatch: int) -> bool:
        """Tell whether an update may be made; if not, keep its offences, and lose ``main_grad``.

        And delayed scaling forgets: what is not finite would keep its scales as they are for as
        long as it remembers.
        """
        if is_finite(found.done, found.mine):
            return True
        chains = [
            tuple(tuple(found.sequences[at] for at in members) for members in plan)
            for plan in found.plans
        ]
        blamed = blame(found.done, found.mine)
        self.offences += offences(blamed, chains, minibatch, found.denominator)
        self._forget(found)
        return False

    def _forget(self, found: MinibatchGradients) -> None:
        """Let delayed scaling remember what it did before these passes."""
        for kept, value in zip(self.policy.delayed_scaling(), found.scaling, strict=True):
            kept.copy_(value)

    def _accumulate(
        self,
        sequences: Sequence[TrainingSequence],
        denominator: float,
        loss: LossOptions,
        accumulator: Accumulator | None,
        temperature: float | None = None,
        *,
        compares: bool = False,
    ) -> MinibatchGradients:
        """Accumulate gradients of these sequences, all of which every replica is given."""
        topology, plans = self.policy.topology, self._training_plans(sequences)
        done = MinibatchPass(
            self.policy,
            self._pack(sequences, plans[topology.data.rank], denominator),
            loss,
            accumulator,
            temperature or self.config.rollout.temperature,
        )
        scaling = [kept.clone() for kept in self.policy.delayed_scaling()]
        gate = accumulator.gate if accumulator is not None and compares else None
        if gate is not None:
            gate.arm(done.microbatches)
        mine = done.run()
        if gate is not None:
            self.fp8 = gate.figures(topology)
        sums = sum(topology.gather_over_data(mine), start=Sums())
        return MinibatchGradients(done, mine, sums, sequences, plans, denominator, scaling)

    def check_capture(self) -> None:
        """Prove that every weight hands over its gradient, by a pass over one short sequence.

        For layers whose gradients come through another library's internals. It leaves no gradient,
        and in what delayed scaling remembers no trace: a resumed run has made no pass more.

        Raises:
            RuntimeError: one does not; it is named.
        """
        if self.accumulator is None or self.policy.backend == "torch":
            return
        sequence = TrainingSequence((0, 1), (0, 1), 1.0, (0.0, 0.0))
        replicas = self.policy.topology.data.size
        found = self._accumulate([sequence] * replicas, 1.0, UNIT, self.accumulator)
        for chunk in self.policy.chunks:
            chunk.zero_grad_buffer()
        self._forget(found)

    # ------------------------------------------------------------------ looking

    def logprobs(self, sequences: Sequence[TrainingSequence]) -> list[tuple[float, ...]]:
        """Return log-probabilities of the tokens that count, under the policy's weights; else 0.

        Returns:
            For each sequence L numbers, on every rank.
        """
        topology = self.policy.topology
        plan = self._plan(sequences)
        mine: dict[int, tuple[float, ...]] = {}
        for members, (microbatch, values) in zip(
            plan, self._evaluated(sequences, plan), strict=True
        ):
            if values is None:
                continue
            found = values.double().masked_fill(microbatch.loss_mask == 0, 0.0).tolist()
            for at, (start, stop) in zip(
                members, pairwise(microbatch.sequences.offsets), strict=True
            ):
                # Position t predicts token t + 1, and nothing predicts the first.
                mine[at] = (0.0, *found[start : stop - 1])
        everything: dict[int, tuple[float, ...]] = {}
        for part in topology.gather_over_data(self._agreed(mine)):
            everything |= part
        return [everything[at] for at in range(len(sequences))]

    def divergence(self, sequences: Sequence[TrainingSequence]) -> float:
        """Estimate KL(sampling policy, policy) per token, in nats, by k3 on these rollouts."""
        return self._divergence(self._evaluated(sequences, self._plan(sequences)))

    def divergence_of_reference(self, sequences: Sequence[TrainingSequence]) -> float:
        """Return `divergence` at the weights of the reference policy, without a forward pass.

        The sequences carry its log-probabilities.
        """
        microbatches = self._pack(sequences, self._plan(sequences), 1.0)
        return self._divergence([(m, m.reference_logprobs) for m in microbatches])

    def _divergence(self, evaluated: Sequence[tuple[Microbatch, torch.Tensor | None]]) -> float:
        total, count = 0.0, 0.0
        for microbatch, values in evaluated:
            if values is None:
                continue
            mask = microbatch.loss_mask > 0
            total += kl_estimate(values[mask], microbatch.old_logprobs[mask])
            count += float(mask.sum())
        shares = self.policy.topology.gather_over_data(self._agreed((total, count)))
        return sum(total for total, _ in shares) / max(1.0, sum(count for _, count in shares))

    def _agreed[Value](self, value: Value) -> Value:
        """Return what the last stage has found, bit by bit the same on all ranks of this replica.

        Penalties and coefficients are made of it, and with them how many microbatches there are.
        """
        topology = self.policy.topology
        return topology.from_model_rank_0(topology.from_last_stage(value))

    def _evaluated(
        self, sequences: Sequence[TrainingSequence], plan: Plan
    ) -> list[tuple[Microbatch, torch.Tensor | None]]:
        """Return each microbatch with its log-probabilities (T,), None except on the last stage."""
        microbatches = self._pack(sequences, plan, 1.0)
        values = evaluate_logprobs(self.policy, microbatches, self.config.rollout.temperature)
        return list(zip(microbatches, values or [None] * len(microbatches), strict=True))

    # ------------------------------------------------------------------ microbatches

    def _plans(self, sequences: Sequence[TrainingSequence]) -> list[Plan]:
        """Plan each replica's microbatches, as many in all of them."""
        topology, batching = self.policy.topology, self.config.batching
        size = batching.sequences_per_microbatch
        multiple = topology.pipeline.size if topology.virtual_pipeline > 1 else 1
        if size is not None:
            return consecutive_microbatches(len(sequences), size, topology.data.size, multiple)
        return plan_microbatches(
            [len(sequence.tokens) for sequence in sequences],
            batching.tokens_per_microbatch,
            topology.data.size,
            multiple,
        )

    def _plan(self, sequences: Sequence[TrainingSequence]) -> Plan:
        """Plan this replica's microbatches."""
        return self._plans(sequences)[self.policy.topology.data.rank]

    def _training_plans(self, sequences: Sequence[TrainingSequence]) -> list[Plan]:
        """Plan a backward pass, to which sequences without loss tokens give nothing."""
        counted = [at for at, sequence in enumerate(sequences) if sequence.loss_tokens]
        if self.config.batching.sequences_per_microbatch is not None:  # who goes with whom stays
            wanted = set(counted)
            return [
                [[at for at in members if at in wanted] for members in plan]
                for plan in self._plans(sequences)
            ]
        return [
            [[counted[at] for at in members] for members in plan]
            for plan in self._plans([sequences[at] for at in counted])
        ]

    def _pack(
        self, sequences: Sequence[TrainingSequence], plan: Plan, denominator: float
    ) -> list[Microbatch]:
        """Pack this replica's microbatches; the denominator counts all replicas."""
        topology = self.policy.topology
        with self.watch("pack"):
            return [
                pack(
                    [sequences[at] for at in members],
                    index,
                    denominator,
                    topology.device,
                    self.policy.token_multiple,
                )
                for index, members in enumerate(plan)
            ]
