#!/usr/bin/env bash
# Guessed: anomalib's post-processor, which brings scores to 0 to 1 for the reader, changes no
# AUROC: that takes the order alone, and engine.test() measures what the model gave.
# Instead: engine.test() measures what is left of it. The scores are divided by the range of those
# in validation, moved until the threshold is 0.5, and clamped; the metrics come after that. With
# val_split_mode="from_train" that is the range of normal photos. Normal photos of another lot, a
# little noisier, lie above it like the defects: all get 1.0, and image AUROC is 0.5, while the same
# model's raw scores are 0.1 for the ones and 1.1 for the others, AUROC 1.0.
# Why it matters: to validate on normal photos is the honest way, and often the only one; it turns
# a perfect ranking into a coin toss in the table. No later threshold can part such scores, and
# with validation on defects the same model looks fine.
# Source: PyPI anomalib 2.7.0 with torch 2.14.1, run on 2026-11-30 (on the CPU with random weights;
# the install takes 6 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check anomalib==2.7.0 torch==2.14.1 \
    torchvision==0.29.1 lightning==2.6.6 torchmetrics==1.9.0 scikit-learn==1.9.1
cd "$folder"
TQDM_DISABLE=1 venv/bin/python -W ignore - <<'PY'
import logging
from pathlib import Path

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore
from PIL import Image
from sklearn.metrics import roc_auc_score

logging.disable(logging.WARNING)
draw = np.random.default_rng(0)


def write(name, count, noise, spot=0):
    Path("parts", name).mkdir(parents=True)
    for i in range(count):
        photo = draw.normal(128, noise, (64, 64, 3))
        photo[20:36, 20:36] += spot
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(f"parts/{name}/{i}.png")


write("train", 60, noise=4)
write("same lot", 15, noise=4)
write("other lot", 15, noise=6)
write("defective", 15, noise=6, spot=60)


def parts(normal, validation):
    options = dict(num_workers=0, seed=0, val_split_mode=validation, val_split_ratio=0.5)
    return Folder("parts", "train", "parts", "defective", normal, **options)


def tested(normal, validation):
    torch.manual_seed(0)
    options = dict(coreset_sampling_ratio=0.05, num_neighbors=1, visualizer=False)
    shrink = Patchcore.configure_pre_processor((64, 64))
    model = Patchcore("resnet18", ["layer2"], False, pre_processor=shrink, **options)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    engine = Engine(accelerator="cpu", default_root_dir="out", **quiet)
    data = parts(normal, validation)
    engine.fit(model, datamodule=data)
    reported = engine.test(model, datamodule=data, verbose=False)[0]["image_AUROC"]
    by_hand, seen = [], []
    for model.post_processor.enable_normalization in (True, False):
        batches = engine.predict(model, dataloaders=data.test_dataloader())
        labels = torch.cat([batch.gt_label for batch in batches])
        scores = torch.cat([batch.pred_score.flatten() for batch in batches])
        by_hand.append(float(roc_auc_score(labels, scores)))
        ends = [scores[labels == kind].aminmax() for kind in (0, 1)]
        seen += [[round(float(end), 3) for end in pair] for pair in ends]
    print(f"{normal}, validation {validation}: AUROC {reported:.3f}, raw {by_hand[1]:.3f}")
    print("    normal and defective:", *seen[:2], "raw:", *seen[2:])
    assert abs(reported - by_hand[0]) < 1e-6 and by_hand[1] == 1
    return reported, seen


assert tested("same lot", "from_train")[0] > 0.95
reported, seen = tested("other lot", "from_train")
assert reported == 0.5 and seen[:2] == [[1, 1], [1, 1]] and seen[2][1] < 0.2 < 1 < seen[3][0]
assert tested("other lot", "from_test")[0] == 1
PY
# Seen:
#   same lot, validation from_train: AUROC 1.000, raw 1.000
#       normal and defective: [0.0, 0.176] [1.0, 1.0] raw: [0.035, 0.042] [1.093, 1.131]
#   other lot, validation from_train: AUROC 0.500, raw 1.000
#       normal and defective: [1.0, 1.0] [1.0, 1.0] raw: [0.093, 0.111] [1.092, 1.129]
#   other lot, validation from_test: AUROC 1.000, raw 1.000
#       normal and defective: [0.0, 0.0] [0.499, 0.535] raw: [0.091, 0.106] [1.089, 1.126]
