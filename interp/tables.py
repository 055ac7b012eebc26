"""Effects as tables: the strongest places for a reader, every score for a file."""

from pathlib import Path

import pandas as pd
import xarray as xr

from interp.files import write_atomically

_HIDDEN = ("metric_clean", "metric_corrupt")
_LABELLED = {"position": "token", "source": "source_token"}  # what is shown in place of a number


def strongest(effects: xr.DataArray | xr.Dataset, n: int = 12) -> str:
    """The n places of each site with the largest mean effect, as text."""
    arrays = [effects] if isinstance(effects, xr.DataArray) else list(effects.data_vars.values())
    names = [effects.attrs["site"]] if isinstance(effects, xr.DataArray) else list(effects.data_vars)
    a = effects.attrs
    lines = [f"{a['model']} on {a['task']} ({a['corruption']}), {a['direction']}, {a['metric']} [{a['unit']}], mean over "
             f"{a['n_prompts']} prompts; {a['sign']}"]  # fmt: skip
    for name, array in zip(names, arrays, strict=True):
        table = array.mean("prompt").rename("effect").to_dataframe().reset_index().dropna(subset="effect")
        table = table.sort_values("effect", key=lambda c: -c.abs(), kind="stable").head(n)
        hidden = {*_HIDDEN, *(number for number, text in _LABELLED.items() if text in table.columns)}
        table = table[[c for c in table.columns if c not in hidden]]
        lines += ["", name, table.to_string(index=False, float_format=lambda v: f"{v:+.4f}")]
    return "\n".join(lines)


def save_effects(effects: xr.DataArray | xr.Dataset, path: str | Path) -> Path:
    """Write every score: .csv or .parquet with one row per prompt and place, or .html with a heatmap of one site."""
    path = Path(path)
    if path.suffix == ".html":
        from interp.plots import heatmap

        return write_atomically(path, heatmap(effects, title=effects.attrs["site"]).to_html(include_plotlyjs=True))
    arrays = [effects] if isinstance(effects, xr.DataArray) else list(effects.data_vars.values())
    names = [effects.attrs["site"]] if isinstance(effects, xr.DataArray) else list(effects.data_vars)
    tables = [
        array.rename("effect").to_dataframe().reset_index().assign(site=name).dropna(subset="effect")
        for name, array in zip(names, arrays, strict=True)
    ]
    table = pd.concat(tables, ignore_index=True)
    if path.suffix == ".csv":
        return write_atomically(path, table.to_csv(index=False))
    return write_atomically(path, table.to_parquet(index=False))
