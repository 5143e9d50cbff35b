"""Labels for a folder of pictures as a user of transformers gets them: what `infer_folder.py` puts beside `infer.py`.

python benchmarks/hf_pipeline.py FOLDER --model MODEL --out labels.csv [--dtype bfloat16] [--workers 1]
"""

import argparse
import csv
from pathlib import Path

import torch
from transformers import pipeline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path)
parser.add_argument("--model", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--workers", type=int, default=0, help="processes that decode and resize")
args = parser.parse_args()

classify = pipeline(
    "image-classification",
    model=args.model,
    dtype=getattr(torch, args.dtype),
    device="cuda" if torch.cuda.is_available() else "cpu",
    batch_size=64,
    num_workers=args.workers,
    top_k=1,
)
paths = sorted(map(str, args.folder.iterdir()))
with args.out.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    for path, answers in zip(paths, classify(paths), strict=True):
        writer.writerow([path, answers[0]["label"], answers[0]["score"]])
