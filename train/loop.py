"""The training loop of every decoder: `main` reads the flags, `fit` runs, `Run.step` is the one
function that trains.

A step takes `batch_size` objects over all ranks, in micro-batches. What it draws (views, posterior
noise, backgrounds) depends only on the seed, the step and the object's place in the batch, so
neither the number of ranks nor an interruption changes it; where the rays of a radiance field start
depends on the rank too. Loss terms are means over a micro-batch, as published, averaged over
micro-batches and ranks.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
from kernels.transfer import to_device
from models import VAE, SparseTensor
from models.finite import NotFinite, check_finite
from models.scene import Scene
from models.vae import load_weights, read_tensors
from train import evaluate as floors
from train.config import PRECISIONS, Config, from_cli, write_config
from train.data.dataset import Batch
from train.data.objects import Objects
from train.files import write_whole
from train.losses.pictures import GradClipper, Pictures, kl
from train.optimizer import LossScale, Optimizer
from train.run import checkpoint, report
from train.run.diagnose import diagnose
from train.run.ends import Rescue, way_back, way_on
from train.run.folder import locked, new_folder
from train.run.latents import Latents, load_encoder
from train.run.machine import Interrupt, Machine, machine, seed_all, seed_of, world_size
from train.run.progress import Progress
from train.run.threads import computing

PATIENCE = 20  # steps in a row that are skipped, at the least loss scale, before a run stops
Build = Callable[[Config, int], VAE]  # (config, feature channels) -> an untrained VAE
# what compares scenes with a batch: Pictures, or a class with the same methods
Compare = type[Pictures]


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum(weight * term); ValueError where a term has no weight or a weight no term."""
    if terms.keys() != weights.keys():
        raise ValueError(
            f"loss terms without a weight: {sorted(terms.keys() - weights.keys())}; "
            f"weights without a term: {sorted(weights.keys() - terms.keys())}"
        )
    return sum(weights[name] * term for name, term in terms.items())


class Objective(nn.Module):
    """A batch -> its loss, its terms and its PSNR: the one forward pass that DDP sees."""

    def __init__(self, vae: VAE, compare: nn.Module, weights: Mapping[str, float]):
        super().__init__()
        self.vae = vae
        self.compare = compare
        self.weights = weights

    def forward(
        self, x: SparseTensor, noise: Tensor, batch: Batch, background: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`noise` [N, latent] and `background` [V, 3] are the step's random draws."""
        posterior, scenes = self.vae(x, noise)
        terms, psnr = self.compare(scenes, batch, background)
        if posterior is not None:
            terms["kl"] = kl(posterior.mean, posterior.logvar)
        loss = weighted(terms, self.weights)
        return loss, {"loss": loss, **terms, "psnr": psnr}


class Run:
    """What a training run holds on one rank; `enter` gives it the folder that it writes to.

    `done` steps are done, `kept` of them saved. Raises ValueError or OSError for whatever it is
    told that cannot be.
    """

    def __init__(
        self, script: str, config: Config, build: Build, here: Machine, compare: Compare = Pictures
    ):
        self.script = script
        self.config = config
        self.here = here
        self.kept = 0
        self.objects = Objects(config, here, compare.meshes)
        self._build = build
        self.vae = self.untrained()
        if config.encoder:
            given = config.encoder, self.objects.channels, config.resolution
            self.encoder, self.digest = load_encoder(*given)
            type(self.vae)(self.encoder, self.vae.decoder)  # raises where their latents differ
        off = {"kl": "the encoder is frozen"} if config.encoder else {}
        weights = asdict(config.weights)
        if not config.lpips:
            off |= {
                name: "no weights given (--lpips FILE)"
                for name in weights
                if name.endswith("lpips")
            }
        self.weights = {name: weight for name, weight in weights.items() if name not in off}
        self.recipe = report.recipe(self.weights, off)
        self.compare = compare(config.lpips).to(here.device)
        self.alone = self.objective = Objective(self.vae, self.compare, self.weights)
        if here.world > 1:
            self.objective = DistributedDataParallel(self.alone, broadcast_buffers=False)
        self.clipper = GradClipper(config.max_norm)
        scale = LossScale() if config.precision == "fp16" else LossScale(0, 0, 0)
        self.optimizer = Optimizer(
            self.vae.named_parameters(),
            self.clipper,
            scale,
            config.weight_decay,
            config.ema,
            config.optimizer == "muon",
        )
        self.latents: Latents | None = None
        if config.resume:
            self._resume(Path(config.resume))

    @property
    def done(self) -> int:
        """How many steps the run has done, skipped ones included."""
        return self.optimizer.steps

    def enter(self, folder: Path) -> None:
        """Take the folder, which rank 0 holds: record the config there."""
        self.folder = folder
        if self.here.leads:
            write_config(self.config, self.script, folder / "config.json")
        if self.config.encoder:
            encoder = self.encoder.to(self.here.device)
            self.latents = Latents(encoder, folder / "latents" / self.digest)

    def untrained(self) -> VAE:
        """The model that the run starts from, the same at every call."""
        seed_all(self.config.seed)
        vae = self._build(self.config, self.objects.channels)
        if self.config.encoder:
            vae = type(vae)(None, vae.decoder)
        vae.set_activation_dtype(PRECISIONS[self.config.precision])
        return vae.to(self.here.device)

    def _resume(self, folder: Path) -> None:
        finished = (folder / "evaluation.json").is_file()
        if not checkpoint.files(folder / "checkpoints") and not finished:
            if self.here.leads:  # it ended before its first save
                print(f"{folder} holds no checkpoint: it starts from step 0")
            return
        self._load(checkpoint.newest(folder / "checkpoints"))
        if self.config.steps < self.done:
            raise ValueError(
                f"--steps {self.config.steps} are fewer than the {self.done} that {folder} has done"
            )
        if self.here.leads:
            self._continued(json.loads((folder / "config.json").read_text())["steps"])

    # the model's input: features, or latents of a frozen encoder
    def _voxels(self, batch: Batch) -> SparseTensor:
        return (
            self.latents(batch)
            if self.latents
            else SparseTensor(batch.features, batch.coords, batch.batch_size)
        )

    @torch.no_grad()
    def decode(self, batch: Batch, vae: VAE | None = None) -> list[Scene]:
        """The scenes of posterior means, by another model of the same kind if one is given."""
        vae = vae or self.vae
        x = self._voxels(batch)
        return vae.decoder(x if self.latents else vae.encoder(x).mode())

    @torch.no_grad()
    def sample(self) -> None:
        """Draw held-out views of a few objects, the true ones above the model's, to
        samples/step_NNNNNNNN.png.
        """
        self.vae.eval()
        batch = self.objects.gallery()
        title = (
            f"train.{self.script}, step {self.done}: views never trained on (unseen: no "
            "view of that object was)"
        )
        file = self.folder / "samples" / f"step_{self.done:08d}.png"
        report.picture(
            self.compare.show(self.decode(batch), batch), self.objects.captions(batch), title, file
        )

    def _draws(
        self, step: int, micro: int, x: SparseTensor, views: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Posterior noise [N, latent] and black or white backgrounds [V, 3] of a micro-batch."""
        first = (
            self.here.rank * self.config.micro_batches(self.here.world) + micro
        ) * self.config.micro_batch
        noise, black_or_white = [], []
        for sample, voxels in enumerate(x.cache.counts):
            generator = torch.Generator().manual_seed(
                seed_of(self.config.seed, step, first + sample)
            )
            noise.append(torch.randn(voxels, self.config.model.latent, generator=generator))
            black_or_white.append(
                torch.randint(2, (views.count(sample), 1), generator=generator)
                .float()
                .expand(-1, 3)
            )
        return to_device(torch.cat(noise), self.here.device), to_device(
            torch.cat(black_or_white), self.here.device
        )

    def _inputs(self, step: int, micro: int, batch: Batch) -> tuple:
        """The objective's arguments for a micro-batch of a step."""
        batch = batch.to(self.here.device, non_blocking=True)
        x = self._voxels(batch)
        noise, background = self._draws(step, micro, x, batch.view_scene)
        return x, noise, batch, background

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Train one step on this rank's micro-batches; returns its row of the log, means over all
        ranks.

        The host waits for a GPU twice, for the norm of the gradients and for the row, and in each
        micro-batch where SparseTensor, the renderers and isosurface say that they read: never in a
        backward pass.
        """
        begin = time.perf_counter()
        device = self.here.device
        seed_all(self.config.seed, self.done, self.here.rank)
        self.vae.train()
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            inputs = self._inputs(self.done, micro, batch)
            # gradients are exchanged after the last micro-batch
            waits = self.here.world > 1 and micro + 1 < len(batches)
            with self.objective.no_sync() if waits else nullcontext():
                loss, values = self.objective(*inputs)
                self.optimizer.backward(loss / len(batches))
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        norm = self.optimizer.step(self.config.lr_at(self.done))
        voxels = float(sum(len(batch.coords) for batch in batches))
        means = self.here.mean(
            torch.stack([*totals.values(), torch.full((), voxels, device=device)])
        ).tolist()
        row = dict(zip(totals, means, strict=False))
        rate = means[-1] * self.here.world / (time.perf_counter() - begin)
        return {
            "step": self.done,
            **row,
            "grad_norm": norm,
            "skipped": self.optimizer.skipped,
            "voxels_per_second": rate,
        }

    def why(self, batches: Sequence[Batch]) -> str:
        """What was not finite in the last step, of these micro-batches: the same on every rank."""
        step = self.done - 1
        rank = self.here.rank
        seed_all(self.config.seed, step, rank)
        inputs = (self._inputs(step, micro, batch) for micro, batch in enumerate(batches))
        try:
            found = diagnose(self.vae, self.alone, self.optimizer.scaled, inputs)
        except RuntimeError as error:  # as from a device without memory
            found = f"the step cannot be repeated: {error}"
        for other, text in enumerate(self.here.every(found)):
            if text:
                return (
                    f"{text} (rank {other} of {self.here.world})" if self.here.world > 1 else text
                )
        return "repeated, the step is finite"

    def unsaved(self) -> bool:
        """Whether this rank should save what an error would lose: no half moved weights."""
        return self.here.leads and not self.optimizer.moving and self.kept != self.done

    def save(self) -> None:
        """Save a checkpoint on rank 0; NotFinite, on every rank, where the state is not finite."""
        self.kept = self.done  # even where it fails: the error that this is need not save again
        weights = {f"model.{name}": t for name, t in read_tensors(self.vae).items()}
        tensors = weights | self.optimizer.tensors()
        folder = self.folder / "checkpoints"
        if not self.here.leads:
            return check_finite(tensors, f"{checkpoint.path(folder, self.done)} is not saved")
        state = {
            "step": self.done,
            "optimizer": self.optimizer.state(),
            "clipper": self.clipper.state_dict(),
        }
        state["sampler"] = self.objects.sampler.state_dict(self.done)
        checkpoint.save(folder, self.done, tensors, state, doubtful=self.optimizer.stuck > 0)

    def _load(self, file: Path) -> None:
        tensors, state = checkpoint.load(file)
        load_weights(self.vae, checkpoint.group(tensors, "model"), str(file))
        try:
            self.optimizer.load(tensors, state["optimizer"])
            self.clipper.load_state_dict(state["clipper"])
            self.objects.sampler.load_state_dict(state["sampler"])
        except KeyError as error:
            raise ValueError(f"{file} is not a checkpoint of a run: it lacks {error}") from error
        self.kept = self.done

    def _continued(self, steps: int) -> None:
        """Say where another number of steps than before changes the learning rate."""
        before = replace(self.config, steps=steps).lr_at(self.done)
        now = self.config.lr_at(self.done)
        if before != now and self.done < self.config.steps:
            print(
                f"--steps {self.config.steps} instead of {steps} is another cosine: the "
                f"learning rate after step {self.done} "
                f"is {now:.2g}, not {before:.2g}"
            )


def fit(run: Run) -> None:
    """Train to the last step with a progress line, checkpoints and pictures, then conclude.

    Ctrl-C or SIGTERM end the run after the step under way: it saves, says how to continue and exits
    with 128 + the signal. An error saves first. Raises NotFinite on every rank after PATIENCE
    skipped steps in a row, and where what is to be saved is not finite.
    """
    config, here, folder = run.config, run.here, run.folder
    if here.leads:
        loss = run.recipe
        data = run.objects.summary()
        print(report.header(run.script, config, here, run.vae, loss, data, folder), flush=True)
    with (
        Interrupt() as interrupt,
        Rescue(run.unsaved, run.save),
        report.Log(folder / "log.jsonl", run.done) if here.leads else nullcontext() as log,
        Progress(config.steps, run.done, shown=here.leads) as progress,
    ):
        begin = time.perf_counter() - (log.seconds if here.leads else 0)
        due = False
        for batches in run.objects.steps():
            row = run.step(batches)
            stop = (
                here.mean(torch.full((), float(interrupt.received), device=here.device)).item() > 0
            )
            last = run.done == config.steps or stop
            due |= run.done % config.save_every == 0
            # weights that may be why steps are skipped would push sound ones out
            saves = last or (due and not run.optimizer.stuck)
            if here.leads:
                log.write(row | {"seconds": round(time.perf_counter() - begin, 3)})
                progress.update(report.note(row), now=saves)
            if run.optimizer.stuck >= PATIENCE:
                steps = f"{PATIENCE} steps in a row were skipped, the last is step {run.done}"
                raise NotFinite(f"{steps}: {run.why(batches)}")
            if saves:
                run.save()  # before the pictures: what is wrong with one must not cost the steps
                due = False
            if here.leads and (last or run.done % config.sample_every == 0):
                run.sample()
                report.curves(log.rows, run.weights, folder / "curves.png")
            if stop:
                break
    if run.done < config.steps:
        if here.leads:
            print(f"stopped at step {run.done}; {way_on(run.script, folder)}")
        raise SystemExit(128 + (interrupt.received or signal.SIGTERM))
    if here.leads:
        conclude(run)


def conclude(run: Run) -> floors.Scores:
    """Keep the trained models as pretrained files, score them beside the floors, print the table,
    write evaluation.json.

    What is kept and scored are the averaged weights, unless the untrained ones still weigh over 5 %
    in the average.
    """
    run.vae.eval()
    averaged = run.optimizer.remembers_start < 0.05
    with run.optimizer.averaged() if averaged else nullcontext():
        for part, model in run.vae.named_children():
            models.save_pretrained(model, run.folder / "checkpoints" / part)
        decoders = {
            "trained": run.decode,
            "untrained": partial(run.decode, vae=run.untrained().eval()),
        }
        rgb = run.config.features == "rgb"
        scores = floors.compare(decoders, run.objects, run.config.resolution, rgb)
        more, table = run.compare.measure(decoders, run.objects)
    weights = "averaged" if averaged else "last"
    values = {
        name: {group: report.finite(asdict(s)) for group, s in row.items()}
        for name, row in scores.items()
    }
    content = {"step": run.done, "weights": weights, "protocol": floors.PROTOCOL, "psnr": values}
    if more:
        content["surface"] = {
            name: {g: report.finite(s) for g, s in row.items()} for name, row in more.items()
        }
    write_whole(run.folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
    tables = "\n".join([floors.table(scores), *([table] if table else [])])
    print(f"{tables}\n({weights} weights of step {run.done}; pictures and curves in {run.folder})")
    return scores


def main(
    script: str,
    presets: Mapping[str, Config],
    build: Build,
    argv: Sequence[str] | None = None,
    compare: Compare = Pictures,
) -> None:
    """The command line of a training script.

    Wrong flags, data, folders and files end with a message and status 2, whenever they are met; a
    disk that is full, or fails, with a message and status 1; numbers that are not finite with
    status 3, or 2 before the training; a second Ctrl-C with status 130. Once there is a folder, the
    message says how to go on.
    """
    config = from_cli(script, presets, argv, world_size())
    here = run = None
    with ExitStack() as stack:
        try:
            here = stack.enter_context(machine(config.device, config.deterministic))
            folder = config.resume
            threads = stack.enter_context(computing(config, here.device))
            here = replace(here, threads=threads)
            config = replace(config, threads=config.threads or threads.number)
            if here.leads and config.resume:
                stack.enter_context(locked(Path(config.resume)))  # before anything in it is read
            began = Run(script, config, build, here, compare)
            if here.leads and not config.resume:
                folder = stack.enter_context(new_folder(script, config.out))
            began.enter(Path(here.agree(folder)))
            run = began
            fit(run)
        except (ValueError, OSError, KeyboardInterrupt) as error:
            stopped = isinstance(error, KeyboardInterrupt)
            diverged = run is not None and isinstance(error, NotFinite)
            what = "interrupted" if stopped else f"error: {error}"
            lines = [f"python -m train.{script}: {what}"]
            if run:
                lines.append((way_back if diverged else way_on)(script, run.folder))
            if here is None or here.leads or not diverged:  # all ranks have diverged, one says so
                print("\n" + "\n".join(lines), file=sys.stderr)
            failed = 1 if run and isinstance(error, OSError) else 2
            raise SystemExit(130 if stopped else 3 if diverged else failed) from error
        except RuntimeError:  # of the device, or a fault of ours: its traceback is wanted
            if run:
                print(way_on(script, run.folder), file=sys.stderr)
            raise
