"""MODEL_ZOO.md, made of the records."""

from tabulate import tabulate

from .records import MODELS, PublishedModel

_PAGE = """# Model zoo

Written by `python -m deformable_detr.model_zoo --write`; change `projects/deformable_detr/model_zoo/records.py`, not
this page.

{table}

## How to read the table

* AP, AP<sub>S</sub>, AP<sub>M</sub> and AP<sub>L</sub> are those of COCO val2017 **as published by the
  [official repository](https://github.com/fundamentalvision/Deformable-DETR)** for these very weights; they were not
  measured with this code. The official training repeats to about ±0.4 AP.
* All models are ResNet-50, trained by the authors for 50 epochs with a total batch of 32.
* params were counted in the official code, with its 91 class outputs. GFLOPs are published by the official repository.
* Hub: the authors' weights in the names of transformers, a mirror made by Hugging Face. Drive: the official file.
  Both load into the same parameters, so take whichever you can reach.

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

`deformable-detr://NAME` works wherever Detectron2 takes a path to weights. It downloads the Hub's file once into
`$FVCORE_CACHE/deformable_detr` (default `~/.torch/iopath_cache/deformable_detr`); `HF_ENDPOINT` names a mirror of the
Hub. Without a network, put `NAME.safetensors` (the Hub's `model.safetensors`) or the official `.pth`, under the name
that Drive gives it, into that folder.

{hashes}

## Licence

{licence}
"""
_HEADERS = (
    "name",
    "model",
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


def render_page() -> str:
    """Return MODEL_ZOO.md."""
    models = MODELS.values()
    known = sum(model.sha256 is not None for model in models)
    hashes = (
        f"The sha256 of {known} of the {len(models)} downloads is known and checked. Of the others the length is\n"
        "compared with what the server announces, and loading compares every key and shape with the model's."
    )
    licences = {(model.code_licence, model.weights_licence) for model in models}
    licence = "; ".join(f"code: {code}, weights: {weights}" for code, weights in sorted(licences))
    best = max(models, key=lambda model: model.ap)
    return _PAGE.format(
        table=render_table(),
        example=best.name,
        hashes=hashes,
        licence=f"{licence[0].upper()}{licence[1:]}, both of the official repository and of the Hub's copies.",
    )


def _row(model: PublishedModel) -> tuple[str, ...]:
    return (
        f"[{model.name}](configs/COCO-Detection/{model.name}.yaml)",
        model.title,
        *(f"{ap:.1f}" for ap in (model.ap, model.ap_small, model.ap_medium, model.ap_large)),
        f"{model.params / 1e6:.1f} M",
        str(model.gflops),
        f"[Hub]({model.hub_page}), [Drive]({model.drive_page})",
    )
