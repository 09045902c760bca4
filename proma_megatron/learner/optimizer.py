"""Megatron's optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from proma_megatron.config.trainer import OptimizerConfig
from proma_megatron.model.policy import Policy


class Optimizer:
    """Stock Adam over the policy's ``main_grad``, with clipping, warm-up and decay.

    In bfloat16 it keeps float32 master weights, copied from the model when it is built: build it
    after the weights are there.

    Args:
        total_steps: optimizer steps over which the learning rate decays.
    """

    def __init__(self, policy: Policy, config: OptimizerConfig, total_steps: int) -> None:
        self.policy, self.config = policy, config
        dtype = policy.config.params_dtype
        with policy.topology.megatron_calls():
            self.optimizer: Any = get_megatron_optimizer(
                MegatronOptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    min_lr=config.min_lr,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.beta1,
                    adam_beta2=config.beta2,
                    adam_eps=config.eps,
                    clip_grad=config.clip_grad,
                    bf16=dtype == torch.bfloat16,
                    params_dtype=dtype,
                    use_distributed_optimizer=config.distributed,
                ),
                list(policy.chunks),
                use_gloo_process_groups=policy.topology.device.type == "cuda",
            )
            self.scheduler = OptimizerParamScheduler(
                self.optimizer,
                init_lr=0.0,
                max_lr=config.lr,
                min_lr=config.min_lr,
                lr_warmup_steps=config.warmup_steps,
                # One more, or the last update would have a rate of min_lr, which may be 0; and
                # Megatron wants warm-up to end before decay does.
                lr_decay_steps=max(total_steps, config.warmup_steps) + 1,
                lr_decay_style=config.decay,
                start_wd=config.weight_decay,
                end_wd=config.weight_decay,
                wd_incr_steps=max(total_steps, 1),
                wd_incr_style="constant",
                # A resumed run follows its own configuration, at the step of the checkpoint.
                use_checkpoint_opt_param_scheduler=False,
                override_opt_param_scheduler=True,
            )

    @property
    def updates(self) -> int:
        """How often the weights have been updated."""
        return int(self.scheduler.num_steps)

    def take_weights(self) -> None:
        """Copy the model's weights anew, where the optimizer keeps copies of them."""
        self.optimizer.reload_model_params()

    def allocate(self) -> None:
        """Prepare for a state to be loaded; of use to Megatron's distributed optimizer only.

        It describes its state by what Adam has, and with torch's Adam stumbles twice over the count
        of steps: where there is none yet, and where it looks for one among the loaded tensors of a
        parameter, though it has set it already.
        """
        for part in self._torch_parts():
            adam = part.optimizer
            fill = part._set_main_param_and_optimizer_states
            part._set_main_param_and_optimizer_states = partial(_without_steps, fill)
            for group in adam.param_groups:
                for parameter in group["params"]:
                    if not adam.state[parameter]:
                        adam.state[parameter] = {
                            "step": torch.zeros((), dtype=torch.float32),
                            "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter),
                        }

    def _own_steps(self) -> None:
        """Let each parameter count its own steps.

        Megatron's distributed optimizer loads one tensor for all of them, which torch's Adam would
        then raise once for every parameter: the rate's correction would be that of a later step.
        """
        for part in self._torch_parts():
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()

    def _torch_parts(self) -> list[Any]:
        """Return Megatron's optimizers around torch's Adam; fused ones count in their own way."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part for part in parts if isinstance(part.optimizer, torch.optim.Adam)]

    def load_state(self, optimizer: Any, scheduler: Any) -> None:
        """Continue from a checkpoint's state, at the rates of this configuration."""
        self.optimizer.load_state_dict(optimizer)
        if self.config.distributed:
            self._own_steps()
        for group in self.optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self.config.lr, self.config.min_lr
        self.scheduler.load_state_dict(scheduler)

    def step(self) -> dict[str, float]:
        """Update the weights from ``main_grad``; return the gradient's norm and the rate used."""
        with self.policy.topology.megatron_calls():
            # Megatron's rate for update n is that of step n; before the first it is still 0.
            self.scheduler.step(increment=1)
            _, norm, _ = self.optimizer.step()
            self.optimizer.zero_grad()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {
            "optimizer/grad_norm": float(norm) if norm is not None else float("nan"),
            "optimizer/lr": max(rates) if rates else 0.0,
        }

    def skip(self) -> dict[str, float]:
        """Drop the gradients; weights, Adam's state and the schedule stay as they are.

        Returns:
            The figures of `step`, which no update has: NaN.
        """
        self.optimizer.zero_grad()
        for chunk in self.policy.chunks:
            chunk.zero_grad_buffer()
        return {"optimizer/grad_norm": math.nan, "optimizer/lr": math.nan}


def _without_steps(fill: Any, parameter: torch.Tensor, tensors: dict[str, Any]) -> None:
    """Fill a parameter's state; what is no tensor, Megatron leaves alone."""
    fill(parameter, {"step": None, **tensors})
