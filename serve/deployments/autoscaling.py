"""The rule of `serve/autoscaling.py` as a policy of Ray Serve, which asks it ten times a second in its controller.

Replicas report by `record_autoscaling_stats`, once a second. Bounds and delays are the rule's own: Serve is told to
apply none. A model at zero is woken by a call that Serve holds for lack of a replica (`serve/gateway/hold.py`); Serve
itself then starts one, before it asks any policy.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve.autoscaling import Autoscaler, Signals
from serve.options import AutoscalingOptions

REPORT_PERIOD_S = 1.0
"""Serve's own default is 10 s, during which a queue can grow by as much."""


def autoscaling_config(options: AutoscalingOptions) -> AutoscalingConfig:
    """Serve's config for a deployment that scales by these options."""
    policy = AutoscalingPolicy(policy_function=LoadPolicy, policy_kwargs=dataclasses.asdict(options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of `metrics_interval_s`: nothing has replaced it yet
        return AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            initial_replicas=options.num_initial,
            metrics_interval_s=REPORT_PERIOD_S,
            look_back_period_s=max(options.look_back_period_s, 2 * REPORT_PERIOD_S),
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=policy,
        )


class LoadPolicy:
    """One per deployment; Serve makes it anew when its controller or the config does."""

    def __init__(self, **options: Any) -> None:
        self._scaler = Autoscaler(AutoscalingOptions(**options))

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        decision = self._scaler.decide(
            _latest(context),
            num_target=context.target_num_replicas,
            num_ready=context.current_num_replicas,
            now=time.monotonic(),
        )
        if decision.num_replicas != context.target_num_replicas:
            logging.getLogger("ray.serve").info(
                "scaling deployment=%s from=%s to=%s reason=%s",
                context.deployment_name,
                context.target_num_replicas,
                decision.num_replicas,
                decision.reason,
            )
        return decision.num_replicas, {}


def _latest(context: AutoscalingContext) -> list[Signals]:
    """What each running replica last reported; nothing of those that have not yet."""
    reported: dict[Any, dict[str, float]] = {}
    for name in (field.name for field in dataclasses.fields(Signals)):
        for replica, series in (context.raw_metrics or {}).get(name, {}).items():
            if series:
                reported.setdefault(replica, {})[name] = series[-1].value
    return [Signals(**values) for values in reported.values()]
