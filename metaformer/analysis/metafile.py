"""The models as OpenMMLab lists its own: counts, the paper's accuracies, recipes and released weights."""

from typing import Any

import yaml

from metaformer.analysis.count import cached_count
from metaformer.analysis.paper import paper, rows_of
from metaformer.variants import ABLATIONS, POOLFORMERS, RELEASES, VARIANTS

HEAD = """\
# Written by analysis/make_tables.py from analysis/paper.yaml, the registry of models and their counts.
# Parameters include frozen ones. FLOPs are multiply-accumulates at 224 x 224 pixels, counted by fvcore.
# Top 1 Accuracy is what the paper prints and is not measured here. Weights are those that its authors released.
"""
DATASET = "ImageNet-1k"


def metafile() -> str:
    """The text of ``configs/classification/metafile.yml``: the models of Table 2 and the ablation of Table 5."""
    printed = {row["build"]: (table, row["top1"]) for table in ("table5", "table2") for row in rows_of(table)}
    collections = {
        "PoolFormer": (POOLFORMERS, "classification", ["Pooling", "1x1 Convolution", "LayerScale"]),
        "MetaFormer ablation": (ABLATIONS, "ablations", ["MetaFormer", "1x1 Convolution", "LayerScale"]),
    }
    source = paper()["paper"]
    content = {
        "Collections": [
            {
                "Name": name,
                "Metadata": {"Training Data": DATASET, "Architecture": architecture},
                "Paper": {"Title": source["title"], "URL": f"https://arxiv.org/abs/{source['arxiv']}"},
                "README": "../../classification/README.md",
                "Code": {"URL": "metaformer/model.py"},
            }
            for name, (_, _, architecture) in collections.items()
        ],
        "Models": [
            entry(build, name, f"configs/{folder}/{build}.yaml", *printed[build])
            for name, (builds, folder, _) in collections.items()
            for build in builds
        ],
    }
    return HEAD + yaml.safe_dump(content, sort_keys=False, width=1000)


def entry(build: str, collection: str, config: str, table: str, top1: float) -> dict[str, Any]:
    counts, release, source = cached_count(build), VARIANTS[build].release, paper()["paper"]
    return {
        "Name": build,
        "In Collection": collection,
        "Metadata": {"FLOPs": sum(counts["macs"].values()), "Parameters": counts["learnable"] + counts["frozen"]},
        "Results": [
            {"Task": "Image Classification", "Dataset": DATASET, "Metrics": {"Top 1 Accuracy": top1}},
        ],
        "Results From": f"arXiv {source['arxiv']}v{source['version']}, {table.replace('table', 'Table ')}, as printed",
        "Config": config,
        **({"Weights": f"{RELEASES}/{release}.pth.tar"} if release else {}),
    }
