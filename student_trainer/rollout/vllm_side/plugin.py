"""Entry points of vLLM's plugins: `register` (vllm.general_plugins) in every process of vLLM, `Endpoint`
(vllm.endpoint_plugins) in the API server of one that names it in VLLM_PLUGINS. Imports nothing large at first: other
people's engines load it too, and it does nothing there.
"""

from __future__ import annotations

import os
from typing import Any

from teacher_api.parent import end_with_parent

SERVER_PID = "PRECEPTOR_ROLLOUT_SERVER_PID"
"""Environment variable: the process whose engine this is."""
GLOO = "gloo"
"""Our transport's name among vLLM's weight-transfer backends."""


def register() -> None:
    """Adds our transport to vLLM's, and ties an engine process to its server: one that is killed leaves no engine
    behind holding a GPU."""
    server = os.environ.get(SERVER_PID)
    if server is None:
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if GLOO not in WeightTransferEngineFactory._registry:
        module = "student_trainer.rollout.vllm_side.gloo_engine"
        WeightTransferEngineFactory.register_engine(GLOO, module, "GlooWeightTransferEngine")
    if server != str(os.getpid()):
        end_with_parent()


class Endpoint:
    """See vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "preceptor-rollout"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        from student_trainer.rollout.vllm_side.routes import router

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        from student_trainer.rollout.vllm_side.service import RolloutService

        state.preceptor_rollout = await RolloutService.on(engine_client)
