"""A training run on one rank: its model, data and optimizer; the training step; saving, resuming.

A step takes `batch_size` objects over all ranks, in micro-batches. What it draws (views, posterior
noise, backgrounds) depends only on the seed, the step and the object's place in the batch, so
neither the number of ranks nor an interruption changes it; where the rays of a radiance field start
depends on the rank too. Loss terms are means over a micro-batch, as published, averaged over
micro-batches and ranks. Where memory is short, a micro-batch goes through in parts (train.parts).
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models import VAE, Scene, SparseTensor, load_weights, read_tensors
from train.config import PRECISIONS, Config, write_config
from train.data.batch import Batch
from train.data.objects import Objects
from train.losses import Loss, Objective, PictureLoss
from train.optimizer import GradClipper, LossScale, Optimizer
from train.parts import arguments, out_of_memory
from train.run import checkpoint
from train.run.diagnose import diagnose
from train.run.latents import Latents, load_encoder
from train.run.machine import Machine, seed_all
from train.run.start import started

Presets = Mapping[str, Config]  # by name, the default first
Build = Callable[[Config, int], VAE]  # (config, feature channels) -> an untrained VAE


class Run:
    """A training run on one rank. `enter` gives it the folder that it writes to.

    `script` is NAME of `python -m train.NAME`, `build` makes the untrained VAE, and `loss` compares
    decoded scenes with a batch. `done` counts the steps that are done, `kept` those that are saved;
    a micro-batch goes through in `parts`, which train.run.memory chooses.
    Raises ValueError or OSError for a config, a dataset or a file that cannot be used.
    """

    def __init__(
        self,
        script: str,
        config: Config,
        build: Build,
        here: Machine,
        loss: type[Loss] = PictureLoss,
    ):
        self.script = script
        self.config = config
        self.here = here
        self.kept = 0
        self.parts = 1
        self.memory: object | None = None  # what train.run.memory found
        self._halved = False  # whether memory has run out once
        self._exchanging = False  # whether gradients are on their way between ranks
        self._build = build
        if config.resume:
            checkpoint.check_config(Path(config.resume), config)
        self.objects = Objects(config, here, loss.meshes)
        if config.resume:
            self._check_size(Path(config.resume))
        self.vae = self.untrained()
        self.digest: str | None = None  # of the frozen encoder
        if config.encoder:
            self.encoder, self.digest = load_encoder(
                config.encoder, self.objects.channels, config.resolution
            )
            type(self.vae)(self.encoder, self.vae.decoder)  # raises where their latents differ
        self.loss = loss(config.lpips).to(here.device)
        weights = asdict(config.weights)
        self.off = self._unused_terms(weights)
        self.weights = {name: weight for name, weight in weights.items() if name not in self.off}
        self.local = Objective(self.vae, self.loss, self.weights)  # of this rank, without DDP
        self.objective = self.local
        if here.world > 1:
            self.objective = DistributedDataParallel(self.local, broadcast_buffers=False)
        self.clipper = GradClipper(config.max_norm)
        scale = LossScale() if config.precision == "fp16" else LossScale(0, 0, 0)
        self.optimizer = Optimizer(
            ((name, p) for name, p in self.vae.named_parameters() if p.requires_grad),
            self.clipper,
            scale,
            config.weight_decay,
            config.ema,
            config.optimizer == "muon",
        )
        self.latents: Latents | None = None
        if config.resume:
            self._resume(Path(config.resume))

    def _unused_terms(self, weights: Mapping[str, float]) -> dict[str, str]:
        """Loss terms that this run does not compute, with the reason."""
        off = {}
        if self.config.encoder or self.config.freeze == "encoder":
            off["kl"] = "the encoder is frozen"
        if not self.config.lpips:
            perceptual = [name for name in weights if name.endswith("lpips")]
            off |= dict.fromkeys(perceptual, "no weights given (--lpips FILE)")
        return off

    @property
    def done(self) -> int:
        """The number of steps that the run has done, skipped ones included."""
        return self.optimizer.steps

    def enter(self, folder: Path) -> None:
        """Take the run's folder, which rank 0 has locked, and record the config there."""
        self.folder = folder
        if self.here.is_main:
            write_config(self.config, self.script, folder / "config.json")
        if self.config.encoder:
            encoder = self.encoder.to(self.here.device)
            self.latents = Latents(encoder, folder / "latents" / self.digest)

    def untrained(self) -> VAE:
        """Build the model that the run starts from, the same at every call.

        Untrained, but for the parts that --init gives.
        """
        seed_all(self.config.seed)
        vae = self._build(self.config, self.objects.channels)
        size = self.config.model
        for part in (vae.encoder, vae.decoder):
            part.rescale(size.input_gain, size.branch_gain)
        if size.start == "principal" and not self.config.encoder:
            vae.encoder.start_principal(*self.objects.moments, gain=size.input_gain)
        if self.config.encoder:
            vae = type(vae)(None, vae.decoder)
        if self.config.init:
            vae = started(vae, self.config.init)
        if self.config.freeze:
            getattr(vae, self.config.freeze).requires_grad_(False)
        vae.set_activation_dtype(PRECISIONS[self.config.precision])
        return vae.to(self.here.device)

    def _voxels(self, batch: Batch, changed: bool = False) -> SparseTensor:
        """The model's input: features, or latents of a frozen encoder."""
        self.here.beat()
        if self.latents:
            return self.latents(batch, changed)
        return SparseTensor(batch.features, batch.coords, batch.batch_size)

    @torch.no_grad()
    def decode(self, batch: Batch, vae: VAE | None = None) -> list[Scene]:
        """The scenes of posterior means, by another model of the same kind if one is given."""
        vae = vae or self.vae
        x = self._voxels(batch)
        latents = x if self.latents else vae.encoder(x).mode()
        return vae.decoder(latents)

    def recompute(self, on: bool) -> None:
        """Keep no activations inside blocks, or keep them; what is saved of a model stays."""
        for part in (self.vae.encoder, self.vae.decoder):
            if part is not None:
                part.use_checkpoint = on

    def _inputs(self, step: int, micro: int, batch: Batch) -> Iterator[tuple]:
        """The objective's arguments for each part of a micro-batch of a step."""
        self.local.direct = step < self.config.direct
        batch = batch.to(self.here.device, non_blocking=True)
        x = self._voxels(batch, self.config.augment != "none")
        return arguments(self.config, self.here, step, micro, x, batch, self.parts)

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Train one step on this rank's micro-batches; returns its row of the log.

        The values of the row are means over all ranks. The host waits for a GPU twice, for the norm
        of the gradients and for the row, and in each micro-batch where SparseTensor, the renderers
        and isosurface say that they read: never in a backward pass.
        """
        begin = time.perf_counter()
        totals = self._gradients(batches)
        norm = self.optimizer.step(self.config.lr_at(self.done))
        voxels = float(sum(len(batch.coords) for batch in batches))
        here = torch.full((), voxels, device=self.here.device)
        local = torch.stack([*totals.values(), here])
        means = self.here.mean(local).tolist()
        row = dict(zip(totals, means, strict=False))
        rate = means[-1] * self.here.world / (time.perf_counter() - begin)
        return {
            "step": self.done,
            **row,
            "grad_norm": norm,
            "skipped": self.optimizer.skipped,
            "voxels_per_second": rate,
            **({"parts": self.parts} if self.parts > 1 else {}),
        }

    def _gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Sum the gradients of a step; returns the means of the loss and its terms.

        Where the device has no memory left, it goes on in twice as many parts, once in a run. The
        second time it raises MemoryError.
        """
        while True:
            try:
                return self._passes(batches)
            except torch.OutOfMemoryError as error:
                most = self.config.micro_batch
                message = out_of_memory(self.done + 1, self.parts, most, error)
                if self._halved or self._exchanging or self.parts >= most:
                    raise MemoryError(message) from error
            # here, for the error held on to the tensors of the pass
            self._halved = True
            self.parts = min(2 * self.parts, most)
            print(f"\n{message}; it is repeated, and they go in {self.parts} parts", flush=True)
            for p in self.vae.parameters():
                p.grad = None
            if self.here.device.type == "cuda":
                torch.cuda.empty_cache()

    def _passes(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Go forward and backward through every part of every micro-batch."""
        seed_all(self.config.seed, self.done, self.here.rank)
        self.vae.train()
        self._exchanging = False
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            parts = min(self.parts, batch.batch_size)
            for part, args in enumerate(self._inputs(self.done, micro, batch), 1):
                # gradients are exchanged after the last part
                last = part == parts and micro + 1 == len(batches)
                waits = self.here.world > 1 and not last
                with self.objective.no_sync() if waits else nullcontext():
                    loss, values = self.objective(*args)
                    self._exchanging = self.here.world > 1 and last
                    self.optimizer.backward(loss / len(batches))
                for name, value in values.items():
                    totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        return totals

    def explain(self, batches: Sequence[Batch]) -> str:
        """Say what was not finite in the last step, of these micro-batches; the same on all ranks.

        The step is computed again, and nothing is trained.
        """
        step = self.done - 1
        seed_all(self.config.seed, step, self.here.rank)
        inputs = (
            args for micro, batch in enumerate(batches) for args in self._inputs(step, micro, batch)
        )
        try:
            found = diagnose(self.vae, self.local, self.optimizer.scaled, inputs)
        except RuntimeError as error:  # as from a device without memory
            found = f"the step cannot be repeated: {error}"
        for rank, text in enumerate(self.here.gather(found)):
            if text and self.here.world > 1:
                return f"{text} (rank {rank} of {self.here.world})"
            if text:
                return text
        return "repeated, the step is finite"

    # saving and resuming

    def unsaved(self) -> bool:
        """Return whether this rank should save when an error ends the run.

        Not during an optimiser step, when only some weights have moved.
        """
        return self.here.is_main and not self.optimizer.moving and self.kept != self.done

    def save(self) -> None:
        """Save a checkpoint on rank 0.

        Raises NotFinite on every rank where the state is not finite.
        """
        self.kept = self.done  # even if saving fails: SaveOnError must not try again
        weights = {f"model.{name}": t for name, t in read_tensors(self.vae).items()}
        tensors = weights | self.optimizer.tensors()
        folder = self.folder / "checkpoints"
        if not self.here.is_main:
            checkpoint.check(folder, self.done, tensors)
            return
        state = {
            "step": self.done,
            "run": checkpoint.identity(self.config, self.digest, self.objects.digest),
            "optimizer": self.optimizer.state(),
            "clipper": self.clipper.state_dict(),
            "sampler": self.objects.sampler.state_dict(self.done),
        }
        checkpoint.save(folder, self.done, tensors, state, doubtful=self.optimizer.stuck > 0)

    def _check_size(self, folder: Path) -> None:
        """Raise ValueError for a model that the newest checkpoint cannot hold, before it is built.

        What a folder from elsewhere describes may be larger than all memory.
        """
        if not (found := checkpoint.files(folder / "checkpoints")):
            return
        with torch.device("meta"):
            planned = self._build(self.config, self.objects.channels)
        size = 4 * sum(p.numel() for p in planned.decoder.parameters())
        if size > (held := found[-1].stat().st_size):
            raise ValueError(
                f"{found[-1]} has {held} bytes, but the decoder that {folder / 'config.json'} "
                f"describes takes {size}"
            )

    def _resume(self, folder: Path) -> None:
        finished = (folder / "evaluation.json").is_file()
        if not checkpoint.files(folder / "checkpoints") and not finished:
            if self.here.is_main:  # it ended before its first save
                print(f"{folder} holds no checkpoint: it starts from step 0")
            return
        state = self._load(checkpoint.newest(folder / "checkpoints"))
        if self.config.steps < self.done:
            raise ValueError(
                f"--steps {self.config.steps} is fewer than the {self.done} that {folder} has done"
            )
        if self.here.is_main:
            # what a checkpoint of an earlier version does not say
            recorded = json.loads((folder / "config.json").read_bytes())
            before = recorded.get("steps", self.config.steps)
            self._warn_of_another_schedule(state.get("run", {}).get("steps", before))

    def _load(self, file: Path) -> dict:
        """Continue from a checkpoint; returns what in it is no tensor."""
        tensors, state = checkpoint.load(file)
        sampler = self.objects.sampler
        own = checkpoint.identity(self.config, self.digest, self.objects.digest)
        try:
            sampler.load_state_dict(checkpoint.part(state, "sampler"))
            checkpoint.check_run(state, own)
            weights = checkpoint.group(tensors, "model")
            checkpoint.check_fp32(weights)
            load_weights(self.vae, weights, "its weights")
            self.optimizer.load(tensors, checkpoint.part(state, "optimizer"))
            self.clipper.load_state_dict(checkpoint.part(state, "clipper"))
            steps = {"file": state["step"], "optimizer": self.done, "sampler": sampler.step}
            checkpoint.check_steps(steps)
        except ValueError as error:
            reason = f"{file} is not a checkpoint of this run: {error}"
            raise ValueError(f"{reason}{checkpoint.advice(file, own)}") from error
        self.kept = self.done
        if self.here.is_main and (notice := checkpoint.notice(file)):
            print(notice)
        return state

    def _warn_of_another_schedule(self, steps: int) -> None:
        """Print a notice if the new number of steps changes the learning rate."""
        before = replace(self.config, steps=steps).lr_at(self.done)
        now = self.config.lr_at(self.done)
        if before != now and self.done < self.config.steps:
            print(
                f"--steps {self.config.steps} instead of {steps} is another cosine: the "
                f"learning rate after step {self.done} is {now:.2g}, not {before:.2g}"
            )
