"""Training end to end, `train.py` beside Hugging Face's Trainer with PEFT: the same pictures, heads, loss and LoRA.

    pip install -r benchmarks/requirements.txt
    python benchmarks/end_to_end.py --data FOLDER --backbone vit_tiny_patch16_224 --weights FILE --img-size 112

Takes the options of `train.py`. *Trainer* is what a user of transformers writes: HF's ViT under PEFT, pictures decoded,
resized and normalised by torchvision in a worker process for each core, `Trainer.train()` with autocast, accumulation
and clipping, never compiled. *train.py* is its own `train_epoch`, with its image store already built, as it is from the
second epoch on. They take turns; a turn is `STEPS` optimizer steps. Trainer's clock starts after the first step, when
its workers run. *peak* is the most memory that tensors take in a turn beyond the models; what Trainer's workers need is
not counted.
"""

import copy
import io
import os
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import machine, peak_memory, training
from lora_step import HF_TARGETS, hf_vit

from errors import exits_cleanly
from lora import merge_lora
from models.classifier import AttributeClassifier, attribute_losses
from task import Task

ROUNDS, STEPS = 7, 8


class Pictures(Dataset):
    """The train rows as a user of torchvision reads them: decode, resize, flip, normalise, one picture at a time."""

    def __init__(self, task: Task):
        p = task.preprocess
        self.catalogue, self.labels, self.rows = task.catalogue, task.labels, task.store.rows("train")
        self.transform = transforms.Compose(
            [
                transforms.Resize(p.size, transforms.InterpolationMode(p.interpolation)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(p.mean, p.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        image = Image.open(io.BytesIO(self.catalogue.read(row))).convert("RGB")
        return {"pixel_values": self.transform(image), "labels": torch.from_numpy(self.labels[row]).long()}


class HFBackbone(nn.Module):
    """Hugging Face's ViT under PEFT, as `AttributeClassifier` reads a backbone."""

    num_prefix_tokens = 1

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, self.fc_norm = vit, nn.Identity()

    def forward_features(self, images):
        return self.vit(pixel_values=images).last_hidden_state

    def forward_head(self, tokens):
        return tokens[:, 0]


class ForTrainer(nn.Module):
    """The classifier with its loss, as Trainer calls it."""

    def __init__(self, classifier: AttributeClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values, labels):
        return {"loss": attribute_losses(self.classifier(pixel_values), labels).sum()}


class Clock(transformers.TrainerCallback):
    """When each optimizer step ended."""

    def on_train_begin(self, *_, **__):
        self.ends = []

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def make_trainer(task: Task, args, folder: Path, clock: Clock) -> transformers.Trainer:
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules=HF_TARGETS)
    vit = HFBackbone(peft.get_peft_model(hf_vit(merge_lora(task.model).backbone), config))
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS + 1,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accum,
        learning_rate=args.lr,
        bf16=args.amp == "bf16",
        fp16=args.amp == "fp16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=os.cpu_count(),
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = ForTrainer(AttributeClassifier(vit, copy.deepcopy(task.model.heads)))
    return transformers.Trainer(model, options, train_dataset=Pictures(task), callbacks=[clock])


@exits_cleanly
def main() -> None:
    with training(sys.argv[1:]) as run:
        args, task, clock = run.args, run.task, Clock()
        trainer = make_trainer(task, args, args.out / "trainer", clock)
        images = STEPS * run.window_size

        def ours() -> float:
            start = time.perf_counter()
            run.last_steps(STEPS)
            return images / (time.perf_counter() - start)

        def theirs() -> float:
            trainer.train()
            return images / (clock.ends[-1] - clock.ends[0])

        speed = {ours: [], theirs: []}
        for round_ in tqdm(range(ROUNDS + 1), desc="rounds"):
            for way in (ours, theirs) if round_ % 2 else (theirs, ours):
                found = way()
                if round_:  # the first warms up
                    speed[way].append(found)
        peak = {way: peak_memory(way, run.device) for way in speed}
    ratios = [a / b for a, b in zip(speed[ours], speed[theirs], strict=True)]
    print(
        f"{args.backbone}, {task.preprocess.size[0]} px, {args.amp or 'fp32'}, batch {args.batch_size} x {args.accum}"
    )
    print(machine(run.device, peft, transformers))
    for name, way in (("Trainer + PEFT", theirs), ("train.py", ours)):
        print(f"{name:<16}{statistics.median(speed[way]):8.1f} images/s, peak {peak[way] / 1e9:.2f} GB")
    print(f"ratio           {statistics.median(ratios):8.2f}  (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()
