"""The quantization "kvsink" of vLLM: a rewritten folder's plan and tables, and what they make of a model's layers.

Source     vLLM's `QuantizationConfig`
Raises     KvsinkError in one line for what is not served, before weights load
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from kvsink.calibrate.skeleton import skeleton
from kvsink.errors import SidecarError, UnsupportedError
from kvsink.export.vllm.page import PLACES, LayerPages, first_head
from kvsink.export.vllm.refusals import Plan, check_engine, check_folder, check_layer, read_plan
from kvsink.export.vllm.sinks import SHARE, Sinks
from kvsink.export.vllm.tiles import TilePages
from kvsink.folder.sidecar import SIDECAR_JSON, SIDECAR_TENSORS, read_sidecar
from kvsink.model.runtime import Runtime

__all__ = ["KVSinkConfig"]

logger = init_logger("vllm.kvsink")


class KVSinkConfig(QuantizationConfig):
    """What is known of one folder. Processes are handed it with the plan alone; tables are read where layers are made."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.record = config
        self.folder: Path | None = None
        self.plan: Plan | None = None
        self._live: tuple[Runtime, Sinks] | None = None

    @classmethod
    def get_name(cls) -> Any:
        return "kvsink"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KVSinkConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the folder, which may be a hub's, and look at its plan."""
        self.folder = Path(model_name)
        if not self.folder.is_dir():
            try:
                found = [cached_file(model_name, name, revision=revision) for name in (SIDECAR_TENSORS, SIDECAR_JSON)]
            except (OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise SidecarError(f"{model_name} says it is a kvsink model but its plan cannot be had ({reason})") from error
            self.folder = Path(found[-1]).parent
        self.plan = read_plan(self.folder)
        check_folder(self.plan)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Tables lie beside the weights, and are not weights."""
        tables = r"^(layers\.\d+\.([kv]_[a-z0-9_]+|(offset|start)_(cos|sin))|fingerprint|decoder)$"
        return WeightsMapper(orig_to_new_regex={re.compile(tables): None})

    def live(self) -> tuple[Runtime, Sinks]:
        """Tables and what blocks write, where the model is made; the engine's options are looked at first."""
        assert self.folder is not None and self.plan is not None
        if self._live is None:
            config = get_current_vllm_config()
            check_engine(self.plan, config, current_platform.device_type)
            with torch.device("cpu"):
                runtime = read_sidecar(skeleton(self.folder), self.folder / SIDECAR_JSON, self.folder / SIDECAR_TENSORS)
            most = max(config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len)
            self._live = runtime, Sinks(runtime.stages, most)
            self._tell(self.plan)
        return self._live

    def _tell(self, plan: Plan) -> None:
        sources = sorted({s.source.partition(":")[0] for of in plan.segments for s in of})
        places = f"{self.places} exact rows a page by {', '.join(sources)}" if sources else "no row exact"
        by_rank = f"; kvsink:K is taken as sinks:{SHARE:g}, by which a row decides for itself" if "stage" in sources else ""
        logger.info("kvsink: %d layers in packed pages, %s%s", len(plan.codecs), places, by_rank)

    @property
    def places(self) -> int:
        """Exact rows of a page."""
        assert self.plan is not None
        return self.plan.places or PLACES

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        _, sinks = self.live()
        if isinstance(layer, Attention):
            from kvsink.export.vllm.method import KVSinkMethod

            return KVSinkMethod(self)
        if isinstance(layer, LinearBase):
            sinks.watch(prefix, layer)
            return UnquantizedLinearMethod()
        if "Experts" in type(layer).__name__ or "MoE" in type(layer).__name__:
            raise UnsupportedError(f"kvsink in vLLM: {prefix} is a mixture of experts, which is not served yet")
        return None

    def pages_of(self, layer: Any, index: int) -> LayerPages | TilePages:
        """The pages of an attention layer of this rank."""
        assert self.plan is not None
        runtime, sinks = self.live()
        check_layer(self.plan, index, layer)
        sinks.check(self.plan.segments[index], index)
        rank, ranks, total = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), self.plan.kv_heads[index]
        first = first_head(total, layer.num_kv_heads, rank, ranks)
        tokens = get_current_vllm_config().model_config.max_model_len
        held = runtime, index, first, layer.num_kv_heads, tokens, self.places, layer.dtype, sinks
        if current_platform.device_type != "cuda":
            return LayerPages(*held)
        return TilePages(*held, layer.num_heads, torch.device("cuda", torch.cuda.current_device()))
