#!/usr/bin/env bash
# Guessed: anomalib's MH-PatchCore keeps a memory bank of `memory_bank_size` = 1000 patch
# features, its default, whenever training shows it more patches than that, which two photos do.
# Instead: the bank's size is 256 times the number of ones in the binary form of the number of
# batches, up to 1000. Blocks of 256 are merged in pairs like a binary counter, and only what is
# left at the end is joined: 7 batches (111) leave 768 features, 8 (1000) leave 256, whatever the
# batches hold.
# Why it matters: 8 batches of 32 photos make a smaller bank than 7, and the same photos give
# another bank in other batches. With the default of 32 photos, MVTec AD's zipper (240 photos, 8
# batches) gets a third of what bottle (209, 7 batches) gets, and none of its categories with 60
# to 391 photos the 1000 that are documented.
# Source: PyPI anomalib 2.7.0 with torch 2.14.1, run on 2026-11-29 (on the CPU; the install takes
# 6 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
    anomalib==2.7.0 torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from anomalib.models.image.mh_patchcore.components import MergeReduceMemoryBank


def bank(features, batches):
    memory = MergeReduceMemoryBank()  # the defaults: 1000, in blocks of 256
    assert (memory.memory_bank_size, memory.local_coreset_size) == (1000, 256)
    for batch in features.chunk(batches):
        memory.update(batch)
    memory.finalize()
    return memory.bank


draw = torch.Generator().manual_seed(0)
for batches in range(1, 18):
    features = torch.randn(batches * 300, 8, generator=draw)
    size = len(bank(features, batches))
    print(f"{batches} batches of 300 features: a bank of {size}")
    assert size == min(1000, 256 * batches.bit_count())

features = torch.randn(6000, 8, generator=draw)
sizes = {batches: len(bank(features, batches)) for batches in (1, 3, 8, 15, 16)}
print("the same 6000 features in so many batches:", sizes)
assert sizes == {1: 256, 3: 512, 8: 256, 15: 1000, 16: 256}
PY
# Seen:
#   7 batches of 300 features: a bank of 768
#   8 batches of 300 features: a bank of 256
#   15 batches of 300 features: a bank of 1000
#   16 batches of 300 features: a bank of 256
#   the same 6000 features in so many batches: {1: 256, 3: 512, 8: 256, 15: 1000, 16: 256}
