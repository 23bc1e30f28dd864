"""The model card of a network that was trained here, beside its weights for timm and transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image
from timm.data import create_transform

from metaformer.provenance import read_json, sha256, write_file
from metaformer.weights.files import read_checkpoint
from metaformer.weights.opener import Opened

RECIPE = (
    *("opt", "lr", "weight_decay", "global_batch", "warmup_epochs", "drop_path", "smoothing", "scale", "hflip"),
    *("auto_augment", "mixup", "cutmix", "erase_prob", "precision", "study", "row"),
)
FREQUENCIES = (2, 5, 11)
"""Values of k of the pictures with which a reader of the card can check the logits."""

TEXT = """\
---
{metadata}
---

# {name} trained on {data}

{facts}

The folder is loaded by `timm.create_model("local-dir:FOLDER", pretrained=True)` and, in transformers, by
`AutoModelForImageClassification.from_pretrained("FOLDER")`, both after `import metaformer`.

## Logits to check

In the pictures of this table, the red, green and blue values (c = 0, 1, 2) of the pixel in column x and row y, counted
from 0, are `(k * x + 3 * k * y + 85 * c) % 256`. They are prepared as in validation.

{logits}
"""


def write_card(opened: Opened, folder: Path) -> None:
    """Write ``README.md`` for the ``model.safetensors`` in ``folder`` if it holds the weights of a run's checkpoint.

    The card states the architecture, the data, the recipe, the accuracy after the epoch of the checkpoint, the
    versions, the SHA-256 of the weights, and logits with which a reader can check a copy.
    """
    run = read_json(opened.path.parent / "run.json")
    checkpoint = read_checkpoint(opened.path)
    if (epoch := checkpoint.get("epoch")) is None:  # not written by the run itself
        return
    settings, data, start = run["settings"], run["data"], run["starts"][0]
    name = Path(data["data_dir"]).name or data["dataset"]
    metadata, accuracy = ModelCardData(library_name="timm", tags=["image-classification"]), None
    measured = [] if checkpoint.get("step") else [row for row in run["curve"] if row["epoch"] == epoch]
    for result in measured:  # none of weights within an epoch, or of an epoch that is not recorded yet
        accuracy = f"{result['top1']:.2f} %, {result['top5']:.2f} % of {data['val_images']:,} validation pictures"
        metadata.model_name = opened.name
        metadata.eval_results = [
            EvalResult("image-classification", data["dataset"], name, "accuracy", result["top1"], metric_name="top-1")
        ]
    facts = {
        "Architecture": f"{opened.name} (arXiv 2111.11418), {run['parameters']:,} parameters",
        "Arguments": code(opened.model_args),
        "Input": f"{opened.size[0]} x {opened.size[1]} pixels; {code(opened.inputs)}",
        "Classes": ", ".join(opened.class_names or ()),
        "Top-1, top-5": accuracy,
        "Trained": f"{epoch} of {settings['epochs']} epochs on {data['train_images']:,} pictures, seed {run['seed']}",
        "Recipe": code({key: settings[key] for key in RECIPE if settings[key]}),
        "Code": f"commit {start['commit']}, {start['date']}",
        "Versions": ", ".join(f"{package} {version}" for package, version in start["versions"].items() if version),
        "SHA-256 of the weights": f"`{sha256(folder / 'model.safetensors')}`",
    }
    text = TEXT.format(
        metadata=metadata.to_yaml(),
        name=opened.name,
        data=name,
        facts=table([["", ""], *([key, value] for key, value in facts.items() if value)]),
        logits=table([["k", *(opened.class_names or range(opened.model.num_classes))], *logits(opened)]),
    )
    write_file(folder / "README.md", text.encode())


@torch.inference_mode()
def logits(opened: Opened) -> list[list[str]]:
    """A row of the table for each frequency: the frequency, and the logits with 4 decimals."""
    height, width = opened.size
    y, x, c = np.mgrid[:height, :width, :3]
    prepare = create_transform((3, height, width), **opened.inputs)
    rows = []
    for k in FREQUENCIES:
        picture = Image.fromarray(((k * x + 3 * k * y + 85 * c) % 256).astype(np.uint8))
        rows.append([str(k), *(f"{value:.4f}" for value in opened.model(prepare(picture)[None])[0].tolist())])
    return rows


def code(values: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in values.items())


def table(rows: list[list[str]]) -> str:
    first, *others = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([first, "|" + " --- |" * len(rows[0]), *others])
