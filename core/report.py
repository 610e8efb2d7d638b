"""What a training run prints and writes for people: log lines, TensorBoard, figures."""
import json
import logging
import shlex
import shutil
import time

import numpy as np
from tqdm import tqdm

from core import distributed
from core.card import write_card
from core.checkpoint import find_checkpoint, step_of
from core.cli import script
from core.errors import as_one_line
from core.evaluation import describe_interval
from core.files import write_atomically
from core.labels import CLASS_NAMES, NUM_CLASSES, PROBABILITIES
from core.plots import save_confusion_matrix, save_mistakes_sheet
from core.tables import read_table

log = logging.getLogger("mask")

CARD_INTERVAL = 60  # seconds between two cards of a run, so that they take little of its time
VALID_METRICS = ("log_loss", "macro_f1", "accuracy", "mask_f1", "gender_f1", "age_f1")


def log_data(train_photos, valid_photos, class_weight):
    """Log the size of training and validation, the class counts and the class weights."""
    parts = {"training": train_photos, "validation": valid_photos}
    for name, photos in parts.items():
        log.info(f"{name}: people {photos.person.nunique()}, photos {len(photos)}")
    counts = np.bincount(train_photos.label, minlength=NUM_CLASSES)
    log.info(f"class counts: {' '.join(map(str, counts))}")
    if class_weight is not None:
        log.info(f"class weights: {' '.join(f'{w:.2f}' for w in class_weight.tolist())}")
    # A class without training photos is hardly learned; one without validation photos counts 0 in
    # macro F1.
    for part, photos in parts.items():
        labels = set(photos.label)
        missing = [name for label, name in enumerate(CLASS_NAMES) if label not in labels]
        if labels and missing:
            log.warning(f"warning: no {part} photo of {'; '.join(missing)}")


def log_run(args, model, device, total_steps):
    """Log what the flags mean for this run."""
    parameters = sum(p.numel() for p in model.parameters())
    log.info(f"model: {args.model}, {parameters / 1e6:.1f} M parameters, weights {args.weights}, "
             f"input {args.resize[0]} x {args.resize[1]} (height x width)")
    processes = distributed.world_size()
    shared = f", shared by {processes} processes" if processes > 1 else ""
    log.info(f"steps: {total_steps} of {args.batch_size * args.accumulation_steps} photos{shared} "
             f"({args.epochs} epochs), peak learning rate {args.lr:g}, evaluation every "
             f"{args.eval_steps}")
    log.info(f"device: {device}, results in {args.output_dir}")


class Reporter:
    """Progress bar, log lines and TensorBoard of a run. In all processes but 0 it does nothing.

    Args:
        output_dir: the results folder.
        state: the `TrainerState`, which the training loop updates.
        total_steps: steps of the whole run.
        train_photos, valid_photos: the tables of the photos; there may be no validation photos.
        summarize: `f1.summarize`, which core/ does not import.
    """

    def __init__(self, output_dir, state, total_steps, train_photos, valid_photos, summarize):
        self.output_dir, self.state, self.total_steps = output_dir, state, total_steps
        self.train_photos, self.valid_photos = train_photos, valid_photos
        self.summarize = summarize
        self.photos_per_step = state.args["batch_size"] * state.args["accumulation_steps"]
        self.losses = []  # pairs (step, mean loss of the steps before it)
        self.card_time = time.perf_counter()
        self.is_main = distributed.rank() == 0
        # disable=None: a bar on a terminal, log lines elsewhere
        self.progress = tqdm(total=total_steps, initial=state.step, unit="step", desc="train",
                             disable=None if self.is_main else True)
        self.writer = None
        if self.is_main:
            # Slow to import: errors in flags or data come first.
            from torch.utils.tensorboard import SummaryWriter
            # Hide what a killed run logged after its last checkpoint.
            purge_step = state.step + 1 if state.step else None
            self.writer = SummaryWriter(str(output_dir), purge_step=purge_step)
        self.restart_clock()

    def restart_clock(self):
        """Start measuring the training speed from here."""
        self.clock_step, self.clock_time = self.state.step, time.perf_counter()

    def log_step(self, loss, lr):
        """Report the mean loss since the last call or evaluation, the learning rate, the speed."""
        step, seconds = self.state.step, time.perf_counter() - self.clock_time
        speed = (step - self.clock_step) * self.photos_per_step / seconds
        self.restart_clock()
        if not self.is_main:
            return
        self.losses.append((step, loss))
        for name, value in [("loss", loss), ("learning_rate", lr), ("images_per_second", speed)]:
            self.writer.add_scalar(f"train/{name}", value, step)
        if self.progress.disable:
            log.info(f"step {step}/{self.total_steps}  loss {loss:.4f}  lr {lr:.3g}  "
                     f"{speed:.1f} images/s")
        else:
            self.progress.set_postfix_str(f"loss {loss:.4f}, lr {lr:.3g}, {speed:.1f} images/s")

    def log_evaluation(self, folder):
        """Report the newest evaluation: a log line, TensorBoard and log.jsonl.

        Of the best one also keep the predictions in the results folder, and write figures and
        card, at most once a minute; `report_results` writes these at the end.
        """
        self.restart_clock()
        if not self.is_main:
            return
        self._write_log()
        metrics = self.state.history[-1]
        step = metrics["step"]
        self.writer.add_scalar("train/mean_loss", metrics["train_loss"], step)
        line = f"step {step}  train loss {metrics['train_loss']:.4f}"
        if "macro_f1" in metrics:
            for name in VALID_METRICS:
                line += f"  {name.replace('_', ' ')} {metrics[name]:.4f}"
                self.writer.add_scalar(f"valid/{name}", metrics[name], step)
            for name, value in zip(CLASS_NAMES, metrics["class_f1"], strict=True):
                self.writer.add_scalar(f"valid_class_f1/{name}", value, step)
        self.progress.clear()
        log.info(f"{line}  -> {folder}")
        if step != self.state.best_step:
            return
        if "macro_f1" in metrics:
            self._keep_predictions(folder)
        if time.perf_counter() > self.card_time + CARD_INTERVAL and step < self.total_steps:
            self._write_card(folder, self._read_best(folder))
            self.restart_clock()

    def close(self):
        self.progress.close()
        if self.is_main:
            self.writer.close()

    def _write_log(self):
        # The whole file: a resumed run has no lines of steps that were lost.
        lines = "".join(json.dumps(metrics) + "\n" for metrics in self.state.history)
        (self.output_dir / "log.jsonl").write_text(lines)

    def report_results(self):
        """Report the best checkpoint: its score with interval, its figures, and the next command.
        """
        if not self.is_main:
            return
        best = find_checkpoint(self.output_dir)
        self._write_log()
        result = self._read_best(best)
        if result:
            self._keep_predictions(best)
            table, (score, low, high) = result
            evaluations = len(self.state.history)
            chosen = (f", the best of {evaluations} evaluations (so it is a little too high)"
                      if evaluations > 1 else "")
            interval = describe_interval(low, high, table.person.nunique())
            log.info(f"best macro F1 {score:.4f} at step {step_of(best)}{chosen}; {interval}")
        else:
            log.info(f"trained on everyone, without validation, for {self.state.step} steps")
        self._write_card(best, result)
        path = str(best) if best.is_absolute() else f"./{best}"
        log.info(f"next: {script('inference.py')} --model_dir={shlex.quote(path)}")

    def _read_best(self, folder):
        """Return (predictions, (macro F1, low, high)) of the best checkpoint, or None."""
        if not len(self.valid_photos):
            return None
        table = read_table(folder / "valid_predictions.csv", []).astype(
            dict.fromkeys(["label", "ans"], int) | dict.fromkeys(PROBABILITIES, float))
        labels, answers = table.label.to_numpy(), table["ans"].to_numpy()
        return table, self.summarize(labels, answers, table.person)

    def _keep_predictions(self, folder):
        # f1.py and tools.ensemble read this copy.
        with write_atomically(self.output_dir / "valid_predictions.csv") as temporary:
            shutil.copyfile(folder / "valid_predictions.csv", temporary)

    def _write_card(self, folder, result):
        """Write the figures and the card of the best checkpoint; `result` from `_read_best`."""
        try:
            if result:
                table, _ = result
                save_confusion_matrix(table.label, table["ans"],
                                      self.output_dir / "confusion_matrix.png")
                save_mistakes_sheet(table, self.valid_photos.path,
                                    self.output_dir / "worst_mistakes.png")
            write_card(self.output_dir, folder, self.state, self.losses, self.train_photos,
                       self.valid_photos, result)
        except Exception as error:  # training must not stop for them
            log.warning(f"warning: {self.output_dir}: figures and README.md are incomplete "
                        f"({type(error).__name__}: {as_one_line(error)})")
        self.card_time = time.perf_counter()
