"""A checkpoint ready to answer: takes pictures and titles, gives an object for each, as `infer.py --json` prints it."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data.images import ImageError, decode, raise_if_failing
from data.preprocess import Preprocess
from data.shards import Row
from data.titles import TitleReader
from errors import UserError
from lora import keep_base_in, merge_lora
from memory import in_parts, ran_out
from models.checkpoint import load_checkpoint
from models.decode import Decoder


class Labeller:
    """Rows whose pictures are on the canvas, from `batches` -> {"image", "attributes": {name: {"label", "confidence",
    "decision", "top"}}}, for a number {name: {"value"}}; or {"image", "error"}. A checkpoint with neighbours also gives
    "like": [[id, cosine]], the train pictures that are most alike.

    `top` begins with the label; the next guesses follow, most probable first. One of them may be more probable than the
    label: then the label is what fits the other attributes of the path.

    Args:
        folder: the checkpoint's.
        weights: the backbone's base weights, as `load_checkpoint` takes them.
        joint: choose the labels of a hierarchy so that they form a known path.
        top_k: guesses for each attribute, and train pictures.
        batch_size: pictures at a time; halved as often as memory runs out.
        dtype: of the whole computation; under autocast the tokens would be in fp32 between layers, which in bf16 takes
            a few per cent longer (`benchmarks/inference.py`).
    """

    def __init__(
        self,
        folder: Path,
        weights: Path | None,
        device: torch.device,
        joint: bool,
        top_k: int,
        batch_size: int,
        dtype: torch.dtype,
    ):
        model, config = load_checkpoint(folder, weights)
        self.model, self.device, self.dtype = merge_lora(model).to(device, dtype), device, dtype
        keep_base_in(self.model, dtype)
        self.preprocess, self.decoder = Preprocess(**config["preprocess"]), Decoder(config, joint)
        self.config, self.attributes = config, config["attributes"]
        self.read_titles = TitleReader(config) if config["text"] else None
        self.top_k, self.batch_size, self.most = top_k, batch_size, batch_size

    def batches(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Batches of rows, each picture as uint8 (H, W, 3), or the reason in its place where it cannot be read.

        Threads decode ahead, so three batches are in memory: the one that is answered, the next, and the one after it.
        """

        def read(row: Row) -> Row:
            if isinstance(row.picture, str):
                return row
            try:
                return row._replace(picture=self.preprocess.to_canvas(decode(row.picture)))
            except (ImageError, OSError) as error:
                raise_if_failing(error, row.name)
                return row._replace(picture=str(error))

        rows, ahead = iter(rows), []
        with ThreadPoolExecutor() as pool:
            while True:
                now, ahead = ahead, [pool.submit(read, row) for row in islice(rows, self.batch_size)]
                if now:
                    yield [future.result() for future in now]
                if not ahead:
                    return

    def __call__(self, batch: list[Row]) -> list[dict]:
        try:
            parts, self.most = in_parts(lambda part: self._answer(batch[part]), len(batch), self.most)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            hint = "; free the GPU or hide it: CUDA_VISIBLE_DEVICES=" if self.device.type == "cuda" else ""
            raise UserError(f"out of memory at a single image{hint}") from None
        return [answer for part in parts for answer in part]

    @torch.inference_mode()
    def _answer(self, batch: list[Row]) -> list[dict]:
        answers = [
            {"image": row.name} | ({"error": row.picture} if isinstance(row.picture, str) else {"attributes": {}})
            for row in batch
        ]
        readable = [(row, answer) for row, answer in zip(batch, answers, strict=True) if "attributes" in answer]
        if not readable:
            return answers
        rows, answered = zip(*readable, strict=True)
        said = [answer["attributes"] for answer in answered]
        pixels = torch.from_numpy(np.stack([row.picture for row in rows]))
        tokens = None
        if self.read_titles:
            tokens = torch.from_numpy(self.read_titles([row.title for row in rows])[0]).to(self.device)
        outputs, alike = self.model.explained(self.preprocess(pixels.to(self.device)), tokens)
        outputs = {name: output.float().cpu() for name, output in outputs.items()}  # a GPU is slow at many small things
        finite = torch.cat([*outputs.values()], dim=1).isfinite().all(1)
        if not finite.all():
            reason = f"the model makes no finite numbers of it in {str(self.dtype).removeprefix('torch.')}"
            bad = {id(row) for row, good in zip(rows, finite.tolist(), strict=True) if not good}
            return self._answer([row._replace(picture=reason) if id(row) in bad else row for row in batch])
        self._say_classes(said, outputs)
        for a in (a for a in self.attributes if a["kind"] == "number"):
            values = a["mean"] + a["std"] * outputs[a["name"]][:, 0].double()
            places = 4 - math.floor(math.log10(a["std"]))  # five digits of a deviation, whatever is its unit
            for one, value in zip(said, values.tolist(), strict=True):
                one[a["name"]] = {"value": round(value, places)}
        if alike is not None:
            for answer, voters in zip(answered, self.model.neighbours.voters(alike, self.top_k), strict=True):
                answer["like"] = [[voter.id, round(voter.cosine, 4)] for voter in voters]
        return answers

    def _say_classes(self, said: list[dict], outputs: dict[str, torch.Tensor]) -> None:
        """Put into each picture's `said` what the outputs, {attribute: (B, classes)}, say of its classes."""
        found, probabilities = self.decoder(outputs), self.decoder.probabilities(outputs)
        classes = [a for a in self.attributes if a["kind"] == "class"]
        for column, (attribute, p) in enumerate(zip(classes, probabilities.values(), strict=True)):
            labels, chosen = attribute["labels"], found.labels[:, [column]]  # (B, 1)
            ranked = p.scatter(1, chosen, 2.0)  # the label first: 2 is above any p
            order = ranked.topk(min(self.top_k, len(labels))).indices
            rows = zip(
                said, order.tolist(), p.gather(1, order).tolist(), found.accepted[:, column].tolist(), strict=True
            )
            for one, guesses, row_p, accepted in rows:
                top = [[labels[c], round(q, 4)] for c, q in zip(guesses, row_p, strict=True)]
                one[attribute["name"]] = {
                    "label": top[0][0],
                    "confidence": top[0][1],
                    "decision": "accept" if accepted else "review",
                    "top": top,
                }
