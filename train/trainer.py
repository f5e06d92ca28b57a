"""A training run on one rank: its model and data, the training step, saving and resuming."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kernels.transfer import to_device
from models import VAE, SparseTensor
from models.finite import check_finite
from models.scene import Scene
from models.vae import load_weights, read_tensors
from train.config import PRECISIONS, Config, write_config
from train.data.batch import Batch
from train.data.objects import Objects
from train.losses.objective import Compare, Objective
from train.losses.pictures import Pictures
from train.optimizer import GradClipper, LossScale, Optimizer
from train.run import checkpoint, report
from train.run.diagnose import diagnose
from train.run.latents import Latents, load_encoder
from train.run.machine import Machine, seed_all, seed_of

Build = Callable[[Config, int], VAE]  # (config, feature channels) -> an untrained VAE


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
        self.vae.use_graphs(config.cuda_graphs)
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
