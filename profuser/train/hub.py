"""Uploads the fused model of a complete run to the Hugging Face Hub, where the recipe asks for it.

The model's own files are uploaded: weights, configuration, tokenizer, model card, and the adapter if there is one. What tells of the data,
such as the report and the scored answers, stays here.
"""

from __future__ import annotations

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from profuser.errors import ConfigError, ProfuserError, first_line
from profuser.recipe.schema import HubConfig
from profuser.train.run_directory import RunDirectory
from profuser.train.run_record import model_files


def check_hub(hub: HubConfig | None) -> None:
    """Finds out before a run what would keep its model from being uploaded, as far as it can be known without a network.

    Raises:
        ConfigError: the repository's name is not one, or there is no token.
    """
    if hub is None:
        return
    try:
        validate_repo_id(hub.repository)
    except HFValidationError as error:
        raise ConfigError(
            f"hub.repository must be a name on the Hub such as org/model, got {hub.repository!r} ({first_line(error)}); fix it"
        ) from None
    if get_token() is None:
        raise ConfigError(
            "hub.repository needs a token of the Hub, there is none; run `hf auth login`, or set HF_TOKEN, or take hub out"
        )


def upload(directory: RunDirectory, hub: HubConfig) -> None:
    """Uploads the model of a complete run, unless it is there already, and enters that in the run's record.

    Raises:
        ProfuserError: it cannot be uploaded. The run stays complete.
    """
    record = directory.read()
    if record.get("uploaded") == hub.repository:
        return
    again = "the run is complete, and the same command tries again"
    api = HfApi()
    try:
        api.create_repo(hub.repository, private=hub.private, exist_ok=True)
        public = hub.private and not api.repo_info(hub.repository).private
        if not public:
            api.upload_folder(
                repo_id=hub.repository,
                folder_path=directory.path,
                allow_patterns=sorted(model_files(record)),
                commit_message="A model fused with profuser",
            )
    except Exception as error:  # the Hub, the network and the token each fail in their own kinds
        raise ProfuserError(
            f"the model could not be uploaded to {hub.repository} ({first_line(error)}); {again}"
        ) from error
    if public:
        raise ConfigError(
            f"hub.repository must be private where hub.private is true, {hub.repository} is public; set hub.private: false or name "
            f"another; {again}"
        )
    directory.update(uploaded=hub.repository)
    print(f"uploaded: {hub.repository}", flush=True)
