"""The run: a supervised warm start, then RL steps. `Trainer.step` is one RL step, top to bottom.

Between two steps the run has a `Position`, from which it can go on bit by bit as if nothing had
happened. What a stop, a failure or a crash interrupts is dropped and done again; a step whose
weights are updated already only lacks its validation, and the position says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from proma_megatron.advantages.registry import advantages
from proma_megatron.checkpoints.loading import load_pretrained
from proma_megatron.checkpoints.random_state import seed_generators
from proma_megatron.config.run import RunConfig
from proma_megatron.config.sections import normalizes_std
from proma_megatron.data.demonstrations import Demonstrations
from proma_megatron.data.loading import Data
from proma_megatron.distributed import libraries
from proma_megatron.distributed.topology import Topology
from proma_megatron.errors import NonFiniteError, RewardError, RunStopped
from proma_megatron.evaluation.evaluate import evaluate
from proma_megatron.files import complete_or_absent, write_rows, written
from proma_megatron.learner.divergences import Divergences, due
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.nonfinite import dump
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.references import Batch, References
from proma_megatron.learner.snapshots import WeightSnapshot
from proma_megatron.model.build import build_policy
from proma_megatron.observability.profiler import Off, Profile, Profiler
from proma_megatron.observability.reporter import Reporter
from proma_megatron.observability.timing import Stopwatch
from proma_megatron.processes.stopping import Stops, StopSignals
from proma_megatron.processes.watchdog import Phases
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.factors.materialization import Rates
from proma_megatron.projection.fp8_gate import warning
from proma_megatron.rewards.pool import Scorer
from proma_megatron.rollout.groups import samples_of
from proma_megatron.runs.checkpoint_folder import is_warm_start
from proma_megatron.runs.directory import RunDir
from proma_megatron.training.checkpointing import Keeper
from proma_megatron.training.collect import Collector
from proma_megatron.training.progress import Position
from proma_megatron.types import RolloutGroup, StepReport, TrainingSequence


class Trainer:
    """One run on this rank. Every rank of the layout builds one and calls `run`.

    Args:
        phases: told of what the run is at; None: nobody watches.
        stops: whether to stop early; None: never.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        topology: Topology,
        run_dir: RunDir,
        reporter: Reporter,
        phases: Phases | None = None,
        stops: Stops | None = None,
    ) -> None:
        self.phases = phases or Phases()
        self.stops = stops or Stops(topology, StopSignals(), None, 0.0)
        self.config, self.data, self.topology = config, data, topology
        self.run_dir, self.reporter = run_dir, reporter
        self.scorer = Scorer(config.reward, config.rollout.max_new_tokens)
        seed_generators(config.seed, topology.rank)
        self.policy = build_policy(
            config.model,
            config.model.vocab_size or data.tokenizer.vocab_size,
            config.max_sequence_length,
            topology,
            seed=config.seed if config.model.path is None else None,
            distributed_optimizer=config.optimizer.distributed,
        )
        self.accumulator = self._build_accumulator()
        self.profile: Profiler = Off()
        if config.trainer.profile and topology.is_main:
            title = f"{config.name}: profile of rank 0 of {topology.world_size}"
            self.profile = Profile(run_dir.logs, title, topology.device)
            self.profile.observe(self.policy.config, self.accumulator)
        self.learner = Learner(config, self.policy, self.accumulator, self.profile.phase)
        self.references = References(config, self.learner)
        self.divergences = Divergences(config, self.learner, self.references.needs_step)
        self.optimizer: Optimizer | None = None  # built once the weights are there
        self.keeper = Keeper(config, self.policy, run_dir, reporter, self.divergences.lagged)
        self.demonstrations = Demonstrations(
            data.supervised, data.tokenizer, config.warm_start.guesses, config.seed
        )
        self.stopwatch = Stopwatch(watch=self._watched)
        self.skipped = 0  # steps in a row without any update
        self.joined = False  # whether the weights are in the lagged mean already
        self.here = Position()  # after the last step
        self.sound = self.here  # after the last step with an update
        self.best = -1.0  # validation accuracy so far
        self.collector = Collector(
            config, self.policy, data, self.scorer, run_dir, self.stopwatch, self.stops
        )

    def _build_accumulator(self) -> Accumulator | None:
        if not self.config.projects:
            return None
        path = self.run_dir.rates
        known = Rates.read(path) if self.topology.is_main else None
        accumulator = Accumulator.of(self.policy, self.config.projection, rates=known)
        if self.topology.is_main and known is None and accumulator.rates is not None:
            with written(path):
                accumulator.rates.write(path)
        return accumulator

    @contextmanager
    def _watched(self, phase: str) -> Iterator[None]:
        with self.phases.phase(phase), self.profile.phase(phase):
            yield

    # ------------------------------------------------------------------ the run

    def run(self, resume: bool = False) -> None:
        """Warm start and RL to the end, or from the newest checkpoint.

        Raises:
            RunStopped: it was asked to stop early, and has saved where it stands.
            RewardError: the reward function failed; all but the step in progress is saved, and the
                rollouts of that one are written down.
            NonFiniteError: too many steps in a row had no finite gradient; what was there before
                them is saved.
            StorageError: the disk does not take what the run has to keep.
        """
        if self.topology.device.type == "cuda":
            for line in libraries.in_use(self.policy.backend, self.config.model.fp8):
                self.reporter.message(line)
        with self._profiled(), self._kept():
            newest = self.keeper.newest() if resume else None
            if newest is None or is_warm_start(newest):
                self._begin(newest)
                self._warm_start()
                self._begin_rl()
            else:
                self._resume(newest)
            if self.divergences.initial is None:
                self.divergences.initial = WeightSnapshot(self.policy)
            self.learner.check_capture()
            if self.config.trainer.steps:  # else only the policy that RL would start from is wanted
                self._reinforce()
            self._finish_save()

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """The profile is told at the end, or when the run was asked to stop."""
        try:
            yield
        except RunStopped:
            self._tell_profile()
            raise
        self._tell_profile()

    def _tell_profile(self) -> None:
        told = self.profile.finish()
        if told is not None:
            self.reporter.message(told)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Whatever ends the run early, where it stands is saved first."""
        try:
            yield
        except (_Stopping, RewardError) as end:
            path = self._save(self.here)
            self._finish_save()
            # A signal to a whole job ends the scoring processes, too.
            reason = self.stops.agreed()
            if reason is None:
                raise
            step = self.here.step if self.here.phase == "rl" else 0
            raise RunStopped(reason, step, path) from end
        except NonFiniteError:
            self._finish_save()
            raise

    def _reinforce(self) -> None:
        """RL steps from here to the last."""
        total = self.config.trainer.steps
        self.reporter.start("rl", total, completed=self.here.step)
        self.phases.step = self.here.step
        if self.here.pending is not None:
            self._conclude(StepReport(**self.here.pending))
        elif self.here.step == 0:
            with self.stopwatch.phase("validation"):
                metrics = self.validate(0)
            self.stopwatch.seconds()
            self.reporter.write(StepReport(0, metrics), "rl")
        for step in range(self.here.step + 1, total + 1):
            self._look_up()
            with self.stops.step(), self.profile.step(step, last=step == total):
                self.step(step)

    def step(self, step: int) -> None:
        """One RL step, its report, and the checkpoint if one is due."""
        self.phases.step = step
        with self.stopwatch.phase("step"):
            groups, metrics = self.collector.collect(step, self._look_up)
            batch = [_sequences(found) for found in groups]
            if self.references.needed:
                with self.stopwatch.phase("reference"):
                    batch, found = self.references.attach(batch, self._initial)
                    metrics |= found
            batch = self._judge(groups, batch)
            self._look_up()  # from here on there is no way back
            if self.divergences.lagged is not None:
                with self.stopwatch.phase("kl_lagged"):
                    metrics |= self.divergences.to_lagged(step, batch, joined=self.joined)
                    self.joined = True
            with self.stopwatch.phase("train"):
                metrics |= self._train(step, batch)
            if self.divergences.looks_back(step):
                with self.stopwatch.phase("kl"):
                    metrics |= self.divergences.after_step(step, batch)
            if not self.skipped:
                self.references.adapt(metrics)
        self._count_tokens(metrics)
        metrics |= self.stopwatch.seconds()
        samples = samples_of(groups, self.config.trainer.log_samples)
        self._conclude(StepReport(step, metrics, samples))

    def _count_tokens(self, metrics: Mapping[str, float]) -> None:
        """Tell the profile what this step has sampled, also in rounds whose groups it left out."""
        rollout = self.config.rollout
        sampled = metrics.get("rollout/rounds", 1.0) * rollout.prompts_per_step
        sampled *= rollout.samples_per_prompt * metrics["rollout/length"]
        self.profile.count("rollout", round(sampled))
        self.profile.count("train", round(metrics["tokens/trained"]))

    def _conclude(self, report: StepReport) -> None:
        """Validate if it is due, report the step, save if that is due."""
        step, trainer, metrics = report.step, self.config.trainer, dict(report.metrics)
        score = None
        if due(step, trainer.eval_every, trainer.steps):
            self.here = self._position("rl", step, pending=report)
            with self.stopwatch.phase("step"), self.stopwatch.phase("validation"):
                found = self.validate(step)
            metrics |= found
            score = found["validation/accuracy"]
        for name, seconds in self.stopwatch.seconds().items():
            metrics[name] = metrics.get(name, 0.0) + seconds
        whole = metrics["seconds/step"]
        metrics["tokens/second"] = metrics["tokens/trained"] / whole
        if "seconds/save" in metrics:  # what saves since the last row have cost
            metrics["save/share"] = metrics["seconds/save"] / (whole + metrics["seconds/save"])
        self.reporter.write(StepReport(step, metrics, report.samples), "rl")
        self.here = self._position("rl", step)
        self._stop_at_trouble()
        better = trainer.keep_best > 0 and score is not None and score > self.best
        self.best = max(self.best, -1.0 if score is None else score)
        regular = trainer.save_every > 0 and step % trainer.save_every == 0 and not self.skipped
        if better or regular or step == trainer.steps:
            self._save(self.here, score)

    @property
    def _initial(self) -> WeightSnapshot:
        assert self.divergences.initial is not None, "run takes the snapshot"
        return self.divergences.initial

    def close(self) -> None:
        """End the scoring processes."""
        self.scorer.close()

    # ------------------------------------------------------------------ validation

    def validate(self, step: int) -> dict[str, float]:
        """Accuracy and its kin on the validation split; every completion goes to the disk."""
        found = evaluate(
            self.policy,
            self.data.tokenizer,
            self.data.validation,
            self.config,
            self.scorer,
            step=step,
            look_up=self._look_up,
            interrupt=self.stops.agreed_within_replica,
        )
        if self.topology.is_main:
            path = self.run_dir.evaluation(step)
            with written(path), complete_or_absent(path) as part:
                write_rows(part, found.rows())
        return {f"validation/{name}": value for name, value in found.metrics().items()}

    # ------------------------------------------------------------------ training

    def _judge(self, groups: Sequence[RolloutGroup], batch: Batch) -> Batch:
        """The batch with its advantages."""
        penalties = self.references.penalties(batch)
        rewards = [
            [scored.reward - lost for scored, lost in zip(found.samples, losses, strict=True)]
            for found, losses in zip(groups, penalties, strict=True)
        ]
        values = advantages(groups, rewards, self.config.advantage, normalizes_std(self.config))
        return [
            [replace(s, advantage=value) for s, value in zip(found, of_group, strict=True)]
            for found, of_group in zip(batch, values, strict=True)
        ]

    def _train(self, step: int, batch: Batch) -> dict[str, float]:
        assert self.optimizer is not None
        gate = self.accumulator.gate if self.accumulator is not None else None
        compares = gate is not None and gate.due(step)
        metrics = self.learner.update(
            batch, self.optimizer, self.references.in_loss, compares=compares
        )
        if self.learner.fp8 is not None:
            problem = warning(self.learner.fp8, self.config.projection)
            if problem is not None:
                self.reporter.message(f"step {step}: {problem}")
        self._count_skipped("rl", step, metrics, self.config.batching.minibatches)
        removes = self.accumulator is not None and not self.config.projection.acts_alone
        looked = removes and not metrics["optimizer/skipped"]
        if looked and "projection/removed_energy" not in metrics:
            self.reporter.message(
                "nothing was projected: each replica's minibatch fits into one microbatch; "
                "lower batching.tokens_per_microbatch"
            )
        return metrics

    def _begin(self, newest: Path | None) -> None:
        """The policy and the optimizer of the warm start, from its beginning or a checkpoint."""
        with self.phases.phase("setup"):
            if newest is None and self.config.model.path is not None:
                load_pretrained(self.config, self.policy)
                self.reporter.message(f"loaded the weights of {self.config.model.path}")
            if self.config.warm_start.steps:
                self.optimizer = self._build_warm_optimizer()
            if newest is None:
                self.here = self.sound = self._position("warm_start", 0)
            else:
                self._take_up(self.keeper.load(newest, self.optimizer))
                self.demonstrations.restore(self.here.demonstrations)

    def _begin_rl(self) -> None:
        """The optimizer of RL, and the checkpoint that divergences are measured to."""
        self.optimizer, self.skipped = None, 0  # the warm start's goes before its successor comes
        self.optimizer = self._build_optimizer()
        self.here = self.sound = self._position("rl", 0)
        self._save(self.here)

    def _warm_start(self) -> None:
        """Supervised steps on worked answers, with an optimizer of their own."""
        warm, every = self.config.warm_start, self.config.trainer.save_every
        if not warm.steps:
            return
        optimizer = self.optimizer
        assert optimizer is not None, "_begin builds it"
        done = self.here.step
        self.reporter.start("warm_start", warm.steps, completed=done)
        for step in range(done + 1, warm.steps + 1):
            self._look_up()
            started, self.phases.step = time.perf_counter(), step
            with self.stops.step(), self.stopwatch.phase("warm_start"):
                sequences = self.demonstrations.take(warm.sequences_per_step)
                metrics = self.learner.supervise(sequences, optimizer)
            self.profile.count("warm_start", sum(len(s.tokens) for s in sequences))
            self.stopwatch.seconds()
            metrics["seconds/step"] = time.perf_counter() - started
            self._count_skipped("warm_start", step, metrics)
            self.reporter.write(StepReport(step, metrics), "warm_start")
            self.here = self._position("warm_start", step)
            self._stop_at_trouble()
            if every and step % every == 0 and step < warm.steps:
                self._save(self.here)

    # ------------------------------------------------------------------ stopping

    def _look_up(self) -> None:
        """Where all ranks are in step and nothing would be lost: is the run to stop?"""
        if self.keeper.saving:
            with self.stopwatch.phase("save"):
                self.keeper.poll()
        self.stops.note_save(self.keeper.longest_save)
        if self.stops.agreed() is not None:
            raise _Stopping

    def _count_skipped(
        self, phase: str, step: int, metrics: Mapping[str, float], updates: int = 1
    ) -> None:
        """Count steps without any update, and write down what was to blame for a skipped one."""
        none = metrics["optimizer/skipped"] >= updates
        self.skipped = self.skipped + 1 if none else 0
        self.joined = self.joined and none
        for offence in self.learner.offences:
            path = self.run_dir.nonfinite(
                step, offence.minibatch, offence.replica, offence.microbatch, phase
            )
            if self.topology.is_main:
                with written(path):
                    dump(offence, path)
            self.reporter.message(
                f"skipped an update of step {step}: the {offence.what} of a microbatch is not "
                f"finite; it is in {path}"
            )

    def _stop_at_trouble(self) -> None:
        """After a step: remember where all was well, and give up when it has not been for long.

        Raises:
            NonFiniteError: the position before the trouble is saved.
        """
        if not self.skipped:
            self.sound = self.here
        elif self.skipped >= self.config.trainer.max_skipped_steps:
            # No update since: weights, and what delayed scaling remembers, are those of then. But
            # they have joined the mean.
            path = self._save(replace(self.sound, joined=self.joined, lagged=self.here.lagged))
            raise NonFiniteError(
                f"{self.skipped} steps in a row made no update, for none was finite, expected "
                f"fewer than trainer.max_skipped_steps={self.config.trainer.max_skipped_steps}; "
                f"the policy before them is in {path}, their microbatches are in "
                f"{self.run_dir.path / 'nonfinite'}: lower optimizer.lr, or look at them with "
                "`proma grads`"
            )

    # ------------------------------------------------------------------ checkpoints

    def _build_warm_optimizer(self) -> Optimizer:
        warm = self.config.warm_start
        schedule = self.config.optimizer.model_copy(
            update={
                "lr": warm.lr,
                "min_lr": min(warm.lr, self.config.optimizer.min_lr),
                "warmup_steps": warm.warmup_steps,
                "decay": warm.decay,
            }
        )
        return Optimizer(self.policy, schedule, warm.steps)

    def _build_optimizer(self) -> Optimizer:
        updates = self.config.trainer.steps * self.config.batching.minibatches
        return Optimizer(self.policy, self.config.optimizer, updates)

    def _position(self, phase: str, step: int, pending: StepReport | None = None) -> Position:
        """Where the run stands after this step."""
        lagged = self.divergences.lagged
        return Position(
            phase=phase,
            step=step,
            prompts=self.data.train.state(),
            demonstrations=self.demonstrations.state() if phase == "warm_start" else {},
            kl_coefficient=self.references.coefficient,
            lagged=0 if lagged is None else lagged.count,
            joined=self.joined,
            skipped=self.skipped,
            files=self.reporter.written(),
            pending=None if pending is None else asdict(pending),
        )

    def _save(self, position: Position, score: float | None = None) -> Path:
        with self.stopwatch.phase("save"):
            return self.keeper.save(position, self.optimizer, score)

    def _finish_save(self) -> None:
        with self.stopwatch.phase("save"):
            self.keeper.finish()

    def _resume(self, newest: Path) -> None:
        """Load the newest checkpoint of RL, and the policy that RL started from."""
        with self.phases.phase("setup"):
            self.keeper.load_initial()
            self.divergences.initial = WeightSnapshot(self.policy)
            self.optimizer = self._build_optimizer()
            self._take_up(self.keeper.load(newest, self.optimizer))
            self.best = self.keeper.best_score()

    def _take_up(self, position: Position) -> None:
        self.data.train.restore(position.prompts)
        self.skipped, self.joined = position.skipped, position.joined
        if self.config.loss.kl.target is not None:
            self.references.coefficient = position.kl_coefficient
        self.here = self.sound = position


class _Stopping(Exception):  # noqa: N818 - no error
    """All ranks have agreed to stop."""


def _sequences(found: RolloutGroup) -> list[TrainingSequence]:
    """A group's rollouts as training sequences, whose advantages are still to come."""
    prompt = found.prompt.tokens
    return [
        TrainingSequence(
            tokens=(*prompt, *scored.rollout.tokens),
            loss_mask=(0,) * len(prompt) + (1,) * len(scored.rollout.tokens),
            advantage=0.0,
            old_logprobs=(0.0,) * len(prompt) + scored.rollout.logprobs,
        )
        for scored in found.samples
    ]
