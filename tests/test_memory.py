"""The saving is real: what a process holds while it generates, against the 16-bit cache, measured from outside."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import kvsink
from kvsink.folder.loading import load_model

TOKENS, SHORT, ROWS = 2048, 64, 4


class _Peak(threading.Thread):
    """Samples the resident size of this process every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.top, self.live = 0, True

    def run(self) -> None:
        while self.live:
            self.top = max(self.top, resident())
            time.sleep(0.002)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def settle() -> int:
    """Give freed memory back to the system and say what is left.

    From then on the allocator maps every block of 64 KiB and more by itself and returns it when it is freed, so that the
    resident size is what is in use, not what was in use once.
    """
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(parameter, 1 << 16)
    libc.malloc_trim(0)
    return resident()


def growth(run) -> int:  # type: ignore[no-untyped-def]
    """Peak resident bytes during `run` above those before it."""
    before, peak = settle(), _Peak()
    peak.start()
    run()
    peak.live = False
    peak.join()
    return max(peak.top, resident()) - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see the resident size")
def test_peak_memory_grows_by_less_than_a_quarter_of_the_16_bit_cache(smollm2_dir: Path) -> None:
    model = load_model(smollm2_dir, "cpu")
    kvsink.rewrite(model, "klt", key_bits=2, value_bits=2, calibration_tokens=4096)
    ids = torch.arange(4 * ROWS).reshape(ROWS, 4) + 100
    config = CompileConfig(backend="kvsink", fullgraph=True, mode=None)
    config._compile_all_devices = True

    def generate(tokens: int, slots: int) -> kvsink.KVSinkCache:
        cache = kvsink.KVSinkCache.for_model(model, ROWS, slots)
        model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=tokens - 4,
            min_new_tokens=tokens - 4,
            do_sample=False,
            compile_config=config,
            pad_token_id=0,
        )
        return cache

    for slots in (SHORT, TOKENS):  # compile both, and warm every allocator
        generate(16, slots)
    held: list[kvsink.KVSinkCache] = []
    short = growth(lambda: held.append(generate(SHORT, SHORT)))  # what a step needs at any length: products, logits
    held.clear()
    packed = growth(lambda: held.append(generate(TOKENS, TOKENS)))
    sixteen = 2 * 2 * ROWS * (TOKENS - SHORT) * 30 * 3 * 64  # K and V, 2 bytes, of 30 layers with 3 heads of 64
    print(
        f"peak grows by {packed / 2**20:.1f} MiB for {TOKENS} tokens and {short / 2**20:.1f} MiB for {SHORT}, the 16-bit "
        f"cache by {sixteen / 2**20:.1f} MiB between them; cache.nbytes() {held[0].nbytes() / 2**20:.1f} MiB"
    )
    assert held[0].nbytes() < packed  # the measurement sees at least the cache itself
    assert packed - short < sixteen / 4


def test_a_stock_cache_is_what_the_comparison_counts() -> None:
    cache = DynamicCache()
    rows = torch.zeros(ROWS, 3, 8, 64, dtype=torch.float16)
    cache.update(rows, rows, 0)
    assert sum(t.numel() * t.element_size() for t in (cache.layers[0].keys, cache.layers[0].values)) == 2 * 2 * ROWS * 8 * 192
