"""Draw how far caches are from 16 bit by position: one line a row of `kvsink-eval --length`, its interval behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvsink.evaluate.results import EvalResult

__all__ = ["plot_lengths"]


def plot_lengths(results: Sequence[EvalResult], path: Path) -> None:
    """KL in nats against the positions of each bucket, on logarithmic scales; results must have positions and a reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    ticks: dict[float, str] = {}
    for result in results:
        at = [(max(b.start, b.stop / 4) * b.stop) ** 0.5 for b in result.positions]  # the middle of a bucket, in octaves
        ticks |= dict(zip(at, (b.name for b in result.positions), strict=True))
        label = f"{Path(result.model).name}, {result.method}, {result.bits_per_element:.2f} bits"
        (line,) = axes.plot(at, [b.kl for b in result.positions], marker="o", label=label)
        bounds = [b.kl_interval for b in result.positions]
        if all(pair is not None for pair in bounds):
            low, high = zip(*(pair for pair in bounds if pair is not None), strict=True)
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="position", ylabel="KL to 16 bit (nats)")
    if all(b.kl for result in results for b in result.positions):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    one = results[0]
    axes.set_title(f"{one.text}, {one.windows} windows of {one.window_tokens} tokens; {one.device}, {one.dtype}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
