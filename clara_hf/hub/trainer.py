"""What a trainer uploads: the model with its card as training goes on, and when it has ended."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import run_as_future
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from clara_hf.hub.cards import make_card
from clara_hf.hub.publish import declared_licence, link, push, stage
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.configuration_clara import check_others_can_load, is_hub_id
from modeling_clara.weights_clara import open_repository


logger = logging.get_logger(__name__)

# What is being uploaded lies in such a folder, as links.
UPLOADED = ".upload-"


class PublishingTrainer(Trainer):
    """A Trainer whose `push_to_hub` uploads a model, its card and results, and nothing else of the run's folder."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint is uploaded once it is in its place."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that `push_to_hub` uploads to.

        Raises:
            ValueError: adapters alone over a base that is no Hub id, or a model of another kind.
        """
        if not isinstance(self.model, CLaRaForRetrievalGeneration):
            raise ValueError(
                "push_to_hub is True, but only CLaRa models are uploaded by their trainers: leave it out, and upload "
                "output_dir with `hf upload`."
            )
        check_others_can_load(self.model.config)
        super().init_hf_repo(token, private)
        if self.is_world_process_zero():
            open_repository(self.hub_model_id, token=token or self.args.hub_token, revision=self.args.hub_revision)

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Upload, in the background, a checkpoint's model, and with some strategies all that resuming needs.

        A model over a base that others do not have is uploaded when it is finished and in full.
        """
        strategy = self.args.hub_strategy
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if strategy == HubStrategy.END or is_busy and not self.args.hub_always_push:
            return
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        options = {"commit_message": f"Training in progress, step {self.state.global_step}"}
        job = self._upload(checkpoint, "flat", places.get(strategy), False, **options)
        if job is not None:
            self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if is_busy else []), job])

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **card
    ):
        """Save the model into `output_dir` and upload it with its card and results; nothing else of the run.

        Args:
            card: of [`~clara_hf.hub.cards.make_card`], such as `results_file`.

        Raises:
            ValueError: adapters alone over a base that is no Hub id.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        return self.push_saved(commit_message, blocking, token, revision, **card)

    def push_saved(self, commit_message="End of training", blocking=True, token=None, revision=None, **card):
        """[`push_to_hub`] of the model as it lies in `output_dir`.

        Returns:
            The commit's address, or its future; `None` in other processes than the first.
        """
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        form, options = self.model.config.checkpoint_format, {"commit_message": commit_message, "card": card}
        return self._upload(Path(self.args.output_dir), form, None, blocking, token=token, revision=revision, **options)

    def _upload(self, folder: Path, form: str, place: str | None, blocking: bool, card: dict | None = None, **options):
        """Upload the model in `folder`, if others can load it, to the root, and all of `folder` to `place`."""
        run_folder, base = Path(self.args.output_dir), self.model.config.base_model_name_or_path
        for left in run_folder.glob(f"{UPLOADED}*") if self.push_in_progress is None else ():
            shutil.rmtree(left)  # by a kill
        if form != "full" and not is_hub_id(base) and place is None:
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        staged = Path(tempfile.mkdtemp(prefix=UPLOADED, dir=run_folder))
        made = None
        if form == "full" or is_hub_id(base):
            stage(folder, staged, form)
            known = {"license": declared_licence(self.model.config, options.get("token") or self.args.hub_token)}
            made = self._card(staged, **{**known, **(card or {})})
        if place is not None:
            link(folder, staged / place, ("**/*",))
        options = {**options, "token": options.get("token") or self.args.hub_token}
        options["revision"] = options.get("revision") or self.args.hub_revision

        def upload():
            try:
                return push(staged, made, self.hub_model_id, **options)
            except Exception as error:  # beside the Hub's own errors those of its HTTP library, whichever that is
                reason = " ".join(str(error).split())
                told = f"{folder} was written, but not uploaded to {self.hub_model_id} ({reason})"
                if form != "flat":
                    raise OSError(f"{told}: run clara publish {folder} {self.hub_model_id}.") from error
                logger.warning(f"{told}.")
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        return upload() if blocking else run_as_future(upload)

    def _card(self, folder: Path, license: str | None = None, model_name: str | None = None, **options):
        """The card of the model in `folder`, from what the run's folder and this trainer know."""
        name = self.hub_model_id or Path(self.args.output_dir).resolve().name
        own = {"title": model_name or name.rpartition("/")[2], "repo_id": self.hub_model_id, "base_licence": license}
        run = {**self.args.to_dict(), "num_processes": self.args.world_size}
        state = dataclasses.asdict(self.state)
        return make_card(folder, record=self.args.output_dir, run=run, state=state, **{**own, **options})

    def create_model_card(self, **options) -> None:
        """Write the card into `output_dir`, where the model has been saved; arguments as for `push_to_hub`."""
        if self.is_world_process_zero():
            self._card(Path(self.args.output_dir), **options).save(Path(self.args.output_dir, "README.md"))

    def _push_model(self, is_internal_call: bool) -> None:
        if self.args.push_to_hub and not is_internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
