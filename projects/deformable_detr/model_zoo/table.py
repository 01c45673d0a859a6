"""MODEL_ZOO.md, made of the records."""

from tabulate import tabulate

from .download import weights_url
from .records import MODELS, RECIPES, PublishedModel

_PAGE = """# Model zoo

Written by `python -m deformable_detr.model_zoo --write`; change `projects/deformable_detr/model_zoo/records.py`, not
this page.

{table}

## How to read the table

* AP, AP<sub>S</sub>, AP<sub>M</sub> and AP<sub>L</sub> are those of COCO val2017 **as published for these very
  weights** by their authors,
  {repositories};
  none was measured with this code. What is empty was not published. The training of Deformable DETR repeats to
  about ±0.4 AP.
* epochs x batch: how the authors trained.
* params were counted in the authors' code, with the class outputs of their files; those of H-Deformable-DETR with a
  Swin were added up from the parts. GFLOPs are the published ones.
* Models with a Swin need Detectron2's main branch, as version 0.6 has none ([docs/backbones.md](docs/backbones.md)).
* {recipes}: a recipe without weights, and without a number on COCO, as nobody has trained it there
  ([docs/training.md](docs/training.md)).
* Hub: the authors' weights in the names of transformers, a mirror made by Hugging Face. file, Drive: the authors' own
  file, by a direct link or on a page where a person can fetch it. All of a row load into the same parameters, so take
  whichever you can reach.

## Use them

```python
from deformable_detr import model_zoo

model = model_zoo.get("{example}", trained=True)  # in evaluation mode, on the CPU
cfg = model_zoo.get_config("{example}", trained=True)
```

```
python train_net.py --eval-only --config-file configs/COCO-Detection/{example}.yaml \\
    --weights deformable-detr://{example}
```

`deformable-detr://NAME` works wherever this project takes weights: in `MODEL.WEIGHTS` (`train.init_checkpoint`) for
`train_net.py` and our `Trainer`, and behind `--weights` of every command. Detectron2's own checkpointer, which
`DefaultPredictor`, `demo.py` and its `lazyconfig_train_net.py` have, fetches the file too, but converts no names: give
it what `python -m deformable_detr.checkpoint` makes of the file ([docs/detectron2.md](docs/detectron2.md)).

The address downloads the Hub's file, or the authors' where there is a direct link, once into
`$FVCORE_CACHE/deformable_detr` (default `~/.torch/iopath_cache/deformable_detr`); `HF_ENDPOINT` names a mirror of the
Hub. Without a network, and for what is on Drive alone, put `NAME.safetensors` (the Hub's `model.safetensors`) or the
authors' `.pth`, as `NAME.pth` or under the name that it has there, into that folder.

{hashes}

## Licence

{licence}
"""
_HEADERS = (
    "name",
    "model",
    "epochs x batch",
    "AP",
    "AP<sub>S</sub>",
    "AP<sub>M</sub>",
    "AP<sub>L</sub>",
    "params",
    "GFLOPs",
    "weights",
)


def render_table() -> str:
    """Return the models as a Markdown table."""
    rows = [_row(model) for model in MODELS.values()]
    return tabulate(rows, headers=_HEADERS, tablefmt="github", disable_numparse=True)


def render_list() -> str:
    """Return the models as a table for terminals, with what fits into a line: no titles, no links."""
    rows = [(model.name, *_numbers(model), ", ".join(_sources(model))) for model in MODELS.values()]
    headers = ("name", "epochs x batch", "AP", "APs", "APm", "APl", "params", "weights")
    return tabulate(rows, headers=headers, disable_numparse=True)


def render_page() -> str:
    """Return MODEL_ZOO.md."""
    models = [model for model in MODELS.values() if weights_url(model)]
    known = sum(model.sha256 is not None for model in models)
    hashes = (
        f"The sha256 of {known} of the {len(models)} downloads is known and checked. Of the others the length is\n"
        "compared with what the server announces, and loading compares every key and shape with the model's."
    )
    repositories = dict.fromkeys(f"[{model.repository}]({model.repository_page})" for model in MODELS.values())
    best = max((model for model in MODELS.values() if model.hub_repository), key=lambda model: model.ap)
    return _PAGE.format(
        table=render_table(),
        repositories=",\n  ".join(repositories),
        example=best.name,
        recipes=", ".join(f"[{name}](configs/COCO-Detection/{name}.yaml)" for name in RECIPES),
        hashes=hashes,
        licence=_render_licences(),
    )


def _render_licences() -> str:
    """Return one line for every repository, as its models are all under the same licences."""
    lines = {
        model.repository: f"* {model.repository}: code {model.code_licence}, weights {model.weights_licence}"
        for model in MODELS.values()
    }
    return "\n".join(lines.values())


def _row(model: PublishedModel) -> tuple[str, ...]:
    return (
        f"[{model.name}](configs/COCO-Detection/{model.name}.yaml)",
        model.title,
        *_numbers(model),
        _number(model.gflops, "d"),
        ", ".join(f"[{name}]({link})" for name, link in _sources(model).items()),
    )


def _numbers(model: PublishedModel) -> tuple[str, ...]:
    """Return the cells of "epochs x batch" to "params"."""
    return (
        f"{model.epochs} x {model.batch}",
        *(_number(ap, ".1f") for ap in (model.ap, model.ap_small, model.ap_medium, model.ap_large)),
        f"{model.params / 1e6:.1f} M",
    )


def _sources(model: PublishedModel) -> dict[str, str]:
    """Return where weights are: what the table calls the place -> its address."""
    links = {"Hub": model.hub_repository and model.hub_page, "Drive": model.drive_page, "file": model.address}
    return {name: link for name, link in links.items() if link}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
