"""Every part of a run, made here and handed to whoever uses it."""

from __future__ import annotations

from proma_megatron.checkpoints.random_state import seed_generators
from proma_megatron.config.run import RunConfig
from proma_megatron.data.demonstrations import Demonstrations
from proma_megatron.data.loading import RunData
from proma_megatron.distributed.topology import Topology
from proma_megatron.files import disk_errors
from proma_megatron.learner.divergences import Divergences
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.references import ReferencePolicies
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.observability.profiler import NullProfiler, Profiler, StepProfiler
from proma_megatron.observability.reporter import Reporter
from proma_megatron.processes.stopping import StopAgreement
from proma_megatron.processes.watchdog import Phases
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.factors.materialization import Rates
from proma_megatron.rewards.pool import Scorer
from proma_megatron.runs.directory import RunDir
from proma_megatron.training.checkpointing import Checkpointer
from proma_megatron.training.collect import Collector
from proma_megatron.training.context import StepContext
from proma_megatron.training.progress import Progress
from proma_megatron.training.rl_step import RLStep
from proma_megatron.training.run import TrainingRun
from proma_megatron.training.validation import Validation
from proma_megatron.training.warm_start import WarmStart


def build_run(
    config: RunConfig,
    data: RunData,
    topology: Topology,
    run_dir: RunDir,
    reporter: Reporter,
    phases: Phases,
    stops: StopAgreement,
) -> TrainingRun:
    """Build a run on this rank; all ranks do so together.

    Args:
        phases: told of what the run is at.
        stops: whether to stop early.
    """
    scorer = Scorer(config.reward, config.rollout.max_new_tokens)
    seed_generators(config.seed, topology.rank)
    policy = build_policy(
        config.model,
        config.model.vocab_size or data.tokenizer.vocab_size,
        config.max_sequence_length,
        topology,
        seed=config.seed if config.model.path is None else None,
        distributed_optimizer=config.optimizer.distributed,
    )
    accumulator = _build_accumulator(config, policy, run_dir)
    profiler: Profiler = NullProfiler()
    if config.trainer.profile and topology.is_main:
        title = f"{config.name}: profile of rank 0 of {topology.world_size}"
        profiler = StepProfiler(run_dir.logs, title, topology.device)
        profiler.observe(policy.config, accumulator)
    context = StepContext.of(config, topology, run_dir, reporter, phases, profiler, stops)
    learner = Learner(config, policy, accumulator, profiler.phase)
    references = ReferencePolicies(config, learner)
    divergences = Divergences(config, learner, references.needs_step)
    demonstrations = Demonstrations(
        data.supervised, data.tokenizer, config.warm_start.guesses, config.seed
    )
    keeper = Checkpointer(config, policy, run_dir, reporter, divergences.lagged)
    progress = Progress(context, keeper, data, demonstrations, references, divergences)
    validation = Validation(context, progress, policy, data, scorer)
    collector = Collector(context, policy, data, scorer)
    return TrainingRun(
        context,
        progress,
        WarmStart(context, progress, learner, demonstrations),
        RLStep(context, progress, collector, references, divergences, learner, validation),
        learner,
        divergences,
        scorer,
    )


def _build_accumulator(config: RunConfig, policy: Policy, run_dir: RunDir) -> Accumulator | None:
    """Build the accumulator, with what this machine was measured to do when the run began."""
    if not config.projects:
        return None
    is_main, path = policy.topology.is_main, run_dir.rates
    known = Rates.read(path) if is_main else None
    accumulator = Accumulator.of(policy, config.projection, rates=known)
    if is_main and known is None and accumulator.rates is not None:
        with disk_errors(path):
            accumulator.rates.write(path)
    return accumulator
