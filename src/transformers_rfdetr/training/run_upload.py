"""How a run gets to the Hub: its model with a card in the end, and its checkpoints on the way."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..assets import TINY_NAME, tiny_checkpoint
from ..atomic_files import atomic_file, make_directory, write_text
from ..data.drawing import draw_grid
from ..data.prepared import PreparedDataset
from ..evaluation.curves import draw_png, training_charts
from ..hub.model_card import CURVES, GRID, RECIPE, Run, is_hub_id, model_card
from ..hub.model_code import add_code, add_endpoint
from ..hub.push import create_repository, upload
from .arguments import note_on_metrics
from .data_setup import unprepared
from .lora import ADAPTER_FOLDER
from .resuming import ResumableTrainer
from .run_card import describe_drawn, draw_examples, metrics_of_run, training_settings

logger = logging.get_logger(__name__)

_UPLOADS = HfApi()  # its single thread makes commits one after the other
# Files of the output folder that are uploaded. Not training_args.bin: it is a pickle, and holds the token.
_MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_*",
)
# Arguments that say where a run was, not what it did.
_LOCAL_ARGUMENTS = ("output_dir", "logging_dir", "run_name", "project", "local_rank", "resume_from_checkpoint")


class UploadingTrainer(ResumableTrainer):
    """A trainer that describes its run in a model card, and uploads model and checkpoints."""

    augmentation: Any
    sizes: list[tuple[int, int]]  # (height, width) of multi-scale training

    def init_hf_repo(self, token: str | None = None, private: bool | None = None, kept: str = "") -> None:
        """Create the repository unless it exists; Trainer calls this at its start if `push_to_hub` is set.

        Args:
            token: `hub_token` of the arguments by default.
            private: Whether it is created as a private one, or must be one; `hub_private_repo` by default.
            kept: The end of an error, a sentence that says where the files are.

        Raises:
            ValueError: the repository must be private, but is public.
            OSError: it cannot be created.
        """
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = create_repository(name, private=private, token=token or self.args.hub_token, kept=kept)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        with_code: bool = False,
        endpoint: bool = False,
        **card: Any,
    ) -> Any:
        """Save the model and upload it with its processor, model card, images and the training arguments.

        Checkpoints, `best_...` folders and training_args.bin, which holds the token, are not uploaded.

        Args:
            commit_message: Message of the one commit.
            blocking: Whether to wait; otherwise a `Future` is returned.
            token: `hub_token` of the arguments, or the token that `hf auth login` has stored, by default.
            revision: Branch; `hub_revision` of the arguments by default.
            private: Whether the repository is created as a private one, or must be one; `hub_private_repo` by default.
                With `push_to_hub=True` in the arguments, Trainer has already created it by `hub_private_repo`.
            with_code: Whether to add the code of this package; see [`add_code`].
            endpoint: Whether to add the handler of an Inference Endpoint; see [`add_endpoint`].
            **card: Arguments of [`create_model_card`](RfDetrTrainer.create_model_card).

        Raises:
            ValueError: `private` is set, but the repository is public.
            OSError: the upload failed for good; all files are in the output folder.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with self.evaluated_weights():
            self.write_model(self.args.output_dir)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        access: dict[str, Any] = {"token": token or self.args.hub_token, "kept": f"All files are in {folder}."}
        self.init_hf_repo(private=private, **access)
        code = [*(add_code(folder) if with_code else []), *(add_endpoint(folder) if endpoint else [])]
        self.create_model_card(with_code=with_code, **card)
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()
        files = [*self._model_files(folder), *code, *(folder / name for name in ("README.md", RECIPE, CURVES, GRID))]
        files = [path for path in files if path.is_file()]
        settings = {"revision": revision or self.args.hub_revision, "commit_message": commit_message, **access}
        if blocking:
            return upload(folder, files, self.hub_model_id, **settings)
        return _UPLOADS.run_as_future(upload, folder, files, self.hub_model_id, **settings)

    def upload_checkpoint(self, folder: Path) -> None:
        """Upload the model of a checkpoint in the background, and all of it where `hub_strategy` says so."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        output_dir, files = Path(args.output_dir), []
        for path in self._model_files(folder):  # copies, because the checkpoint may be deleted while it is uploaded
            copy = output_dir / path.relative_to(folder)
            make_directory(copy.parent)
            with atomic_file(copy) as partial:
                shutil.copyfile(path, partial)
            files.append(copy)
        uploads = [(output_dir, files, "")]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            files = [path for path in folder.rglob("*") if path.is_file() and path.name != "training_args.bin"]
            is_last_only = args.hub_strategy == HubStrategy.CHECKPOINT
            uploads.append((folder, files, "last-checkpoint" if is_last_only else folder.name))
        settings: dict[str, Any] = {
            "kept": f"All files are in {folder}.",
            "token": args.hub_token,
            "revision": args.hub_revision,
            "commit_message": f"Training in progress, optimizer step {self.state.global_step}",
        }
        jobs = [
            _UPLOADS.run_as_future(upload, *source, self.hub_model_id, path_in_repo=path_in_repo, **settings)
            for *source, path_in_repo in uploads
        ]
        for job in jobs:
            job.add_done_callback(lambda job: job.exception() and logger.warning(str(job.exception())))
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def create_model_card(
        self,
        *,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        language: str | None = None,
        with_code: bool = False,
        num_images: int = 4,
    ) -> None:
        """Write README.md, curves, images with predictions and the training arguments to the output folder.

        Args:
            model_name: The heading; the name of the repository or of the output folder by default.
            finetuned_from: Hub id of the checkpoint; by default the one that the model was loaded from.
            dataset: Hub ids or names of the training data.
            dataset_tags: More Hub ids or names of the training data.
            tags: Tags for the Hub, besides those of the task.
            license: A license identifier of the Hub.
            language: A language identifier of the Hub.
            with_code: Whether the code is uploaded too.
            num_images: Number of evaluation images that are shown with ground truth and predictions; 0 shows none.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        run = self._describe_run()
        run.base_model = finetuned_from or run.base_model
        run.datasets = list(dict.fromkeys([*_as_list(dataset), *_as_list(dataset_tags)]))
        run.images = self._draw_run(folder, num_images)
        settings = {name: value for name, value in self.args.to_dict().items() if name not in _LOCAL_ARGUMENTS}
        settings = {name: value for name, value in settings.items() if not name.startswith(("hub_", "push_to_hub"))}
        write_text(folder / RECIPE, f"{json.dumps(settings, indent=2, sort_keys=True)}\n")
        text = model_card(
            self.hub_model_id or folder.absolute().name,
            self.model.config,
            has_masks=self.has_masks,
            run=run,
            with_code=with_code,
            title=model_name,
            tags=[*_as_list(getattr(self.model, "model_tags", None)), *_as_list(tags)],
            license=license,
            language=language,
        )
        write_text(folder / "README.md", text)

    def _model_files(self, folder: Path) -> list[Path]:
        """Return what `from_pretrained` and peft read in a folder."""
        patterns = [*_MODEL_FILES, *([f"{ADAPTER_FOLDER}/adapter_*"] if self.args.lora else [])]
        return [path for pattern in patterns for path in sorted(folder.glob(pattern))]

    def _describe_run(self) -> Run:
        args, config = self.args, self.model.config
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"validation": self.eval_dataset}
        datasets = {"train": self.train_dataset, **splits}
        counts = {name: part.dataset.counts() for name, part in datasets.items() if isinstance(part, PreparedDataset)}
        names = list(splits) if isinstance(self.eval_dataset, dict) else [""]
        base = getattr(config, "_name_or_path", None)
        start = TINY_NAME if base == str(tiny_checkpoint()) else base or ""
        return Run(
            base_model=base if is_hub_id(base) else None,
            splits={
                name: (len(datasets[name].dataset), sum(c.objects for c in of.values())) for name, of in counts.items()
            },
            objects={config.id2label[label]: count.objects for label, count in counts.get("train", {}).items()},
            results=metrics_of_run(args, self.state, names, self.class_metric) | self.measured,
            recipe=training_settings(args, self.state, start, self.sizes, self.augmentation),
            note=note_on_metrics(args),
            is_adapter=hasattr(self.model, "peft_config"),
        )

    def _draw_run(self, folder: Path, num_images: int) -> dict[str, str]:
        """Write the images of the card; return their file names and captions."""
        captions = {}
        first_split = next(iter(self.eval_dataset)) if isinstance(self.eval_dataset, dict) else None
        prefix = f"eval_{first_split}_" if first_split else "eval_"
        charts = training_charts(self.state.log_history, prefix, with_learning_rate=False)
        if charts:
            (folder / CURVES).write_bytes(draw_png(charts))
            captions[CURVES] = "Loss and average precision during training"
        rows: Sequence[Any] = []
        if not self.is_fsdp_enabled:  # sharded weights would need every process
            dataset = unprepared(self.eval_dataset[first_split] if first_split else self.eval_dataset)
            with self.evaluated_weights():
                rows = draw_examples(self.model, self.processing_class, dataset, num_images)
        if rows:
            draw_grid(rows, ["ground truth", "predictions"]).save(folder / GRID)
            captions[GRID] = f"Ground truth, and {describe_drawn(self.model.config)}"
        for stale in {CURVES, GRID} - captions.keys():
            (folder / stale).unlink(missing_ok=True)
        return captions


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
