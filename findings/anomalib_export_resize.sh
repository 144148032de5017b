#!/usr/bin/env bash
# Guessed: a fitted anomalib model says the same of a photo by engine.predict(), by the plain call
# model(photo) and by the ONNX file of engine.export(), up to rounding: the file holds the resize,
# the memory bank, the normalization and the threshold.
# Instead: fit, test and predict shrink photos with antialiasing; the call and the export shrink
# them without. On photos of a fine weave, 1024 x 768, shrunk to 256 x 256, the weave is smoothed
# away in the one and becomes a coarse pattern in the other, which no training photo has. Normal
# photos have the score 0.0 by predict, which reports none of them, and 1.0 by the call and the
# file, which report all.
# Why it matters: threshold and metrics were measured on photos that the deployed model never sees,
# and the finer the surface and the larger the camera, the farther off. On a smooth surface, and on
# photos of the model's size, normal photos pass by all three, and that is how exports are tried.
# Source: PyPI anomalib 2.7.0 with torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0,
# run on 2026-11-30 (on the CPU with random weights; the install takes 6 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check anomalib==2.7.0 torch==2.14.1 \
    torchvision==0.29.1 lightning==2.6.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
TQDM_DISABLE=1 venv/bin/python -W ignore - <<'PY'
import logging
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Patchcore
from PIL import Image

logging.disable(logging.WARNING)


def write(name, count, size, period, spot=0):
    """Writes photos of a weave whose threads are so many pixels apart, or of a smooth surface."""
    Path(name).mkdir(parents=True)
    y, x = np.mgrid[: size * 3 // 4, :size]
    weave = 80 * np.sin(2 * np.pi * (x + 0.3 * y) / period) if period else 0 * x
    for i in range(count):
        photo = 128 + weave + draw.normal(0, 4, weave.shape)
        photo[size // 4 : size * 3 // 8, size // 4 : size * 3 // 8] += spot
        image = Image.fromarray(photo.clip(0, 255).astype(np.uint8)).convert("RGB")
        image.save(f"{name}/{i}.png")


def verdicts(name, size, period):
    write(f"{name}/train", 6, size, period)
    write(f"{name}/normal", 4, size, period)
    write(f"{name}/defective", 4, size, period, spot=40)
    torch.manual_seed(0)
    options = dict(num_workers=0, val_split_mode="same_as_test")
    data = Folder(name, "train", name, "defective", "normal", **options)
    model = Patchcore("resnet18", ["layer2"], pre_trained=False, visualizer=False)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    engine = Engine(accelerator="cpu", default_root_dir="out", **quiet)
    engine.fit(model, datamodule=data)
    (batch,) = engine.predict(model, dataloaders=data.test_dataloader())
    with redirect_stdout(StringIO()):  # the exporter's progress
        path = engine.export(model, ExportType.ONNX, export_root=name)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = model.cpu().eval()
    rows = {"predict": (batch.pred_score, batch.pred_label)}
    photos = [np.asarray(Image.open(path), np.float32) / 255 for path in batch.image_path]
    photos = np.stack(photos).transpose(0, 3, 1, 2)
    with torch.no_grad():
        called = model(torch.from_numpy(photos))
    rows["call"] = called.pred_score, called.pred_label
    names = ["pred_score", "pred_label"]
    pairs = photos.reshape(-1, 2, *photos.shape[1:])  # the file takes two photos at a time
    answers = [session.run(names, {session.get_inputs()[0].name: pair}) for pair in pairs]
    rows["ONNX"] = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*answers)]
    reported = {}
    print(f"{name}, {size} pixels wide:")
    for way, (scores, verdict) in rows.items():
        scores, verdict = scores.flatten(), verdict.flatten()
        reported[way] = int(verdict[batch.gt_label == 0].sum())
        ends = [scores[batch.gt_label == kind].aminmax() for kind in (0, 1)]
        ends = [f"{low:.2f} to {high:.2f}" for low, high in ends]
        print(f"    {way}: reports {reported[way]} of 4 normal photos,", end=" ")
        print(f"scores {ends[0]}, defective {ends[1]}")
    by_predict = rows["predict"][0].flatten()
    assert reported["predict"] == 0 and by_predict[batch.gt_label == 0].max() < 0.1
    assert by_predict[batch.gt_label == 1].min() > 0.45
    assert reported["call"] == reported["ONNX"]
    assert abs(rows["call"][0].flatten() - rows["ONNX"][0].flatten()).max() < 1e-3
    return reported["ONNX"]


draw = np.random.default_rng(0)
assert verdicts("weave", 1024, 6) == 4
assert verdicts("smooth", 1024, 0) == 0
assert verdicts("weave as small as the model", 256, 6) == 0
PY
# Seen:
#   weave, 1024 pixels wide:
#       predict: reports 0 of 4 normal photos, scores 0.00 to 0.00, defective 0.50 to 0.50
#       call: reports 4 of 4 normal photos, scores 1.00 to 1.00, defective 1.00 to 1.00
#       ONNX: reports 4 of 4 normal photos, scores 1.00 to 1.00, defective 1.00 to 1.00
#   smooth, 1024 pixels wide:
#       predict: reports 0 of 4 normal photos, scores 0.00 to 0.00, defective 0.50 to 0.50
#       ONNX: reports 0 of 4 normal photos, scores 0.00 to 0.00, defective 0.53 to 0.54
#   weave as small as the model, 256 pixels wide:
#       predict: reports 0 of 4 normal photos, scores 0.00 to 0.00, defective 0.50 to 0.52
#       ONNX: reports 0 of 4 normal photos, scores 0.00 to 0.00, defective 0.50 to 0.52
