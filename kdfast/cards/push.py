"""The way to the hub: who may push is asked before training, and what goes up is a list of names.

Nothing else of a run goes up: run.json, eval/ and card.json name folders of the machine.
"""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from kdfast.cards.model_card import CARD_FILE
from kdfast.common.errors import UserError, first_line
from kdfast.common.files import read_json_object
from kdfast.models.checks import INDEX, MODEL_FILE

# What save_pretrained writes of the weights in several files, and of a tokenizer.
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
TOKENIZER = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
]


def check_access(repo_id: str) -> None:
    """Raise UserError unless the hub knows this user, who may write to the owner of `repo_id`."""
    owner = repo_id.partition("/")[0]
    try:
        user = HfApi().whoami()
        teams = [each for each in user.get("orgs") or () if each.get("roleInOrg") != "read"]
        own = [each["name"] for each in (user, *teams)]
        token = (user.get("auth") or {}).get("accessToken") or {}
    except Exception as error:  # of the network, or of what answered in the hub's place
        reason, remedy = _explain(error)
        raise UserError(f"--push_to_hub {repo_id}: {reason}: {remedy}.") from error
    if owner.lower() not in (each.lower() for each in own):
        raise UserError(
            f"--push_to_hub {repo_id}: the token is that of {own[0]}, who may not write to "
            f"{owner}: name {', '.join(own)} as owner, or log in as another by hf auth login."
        )
    if token.get("role") == "read":
        raise UserError(
            f"--push_to_hub {repo_id}: the token of {own[0]} may only read: make one that may "
            "write, and give it to hf auth login."
        )


def push(folder: Path, repo_id: str, card: str, shown: Iterable[str]) -> str:
    """Upload model, card, results and pictures; a repository that is not there is made, private.

    Args:
        folder: The run's folder.
        repo_id: USER/NAME.
        card: The text of README.md, as it is to stand on the hub.
        shown: Pictures and results that go with it, relative to the folder.

    Returns:
        The address of the model's page.

    Raises:
        UserError: The folder holds no whole model, or the hub refuses.
    """
    names = [*model_files(folder), *shown]
    for name in names:
        if (folder / name).resolve() != folder.resolve() / name or not (folder / name).is_file():
            raise UserError(
                f"--push_to_hub {repo_id}: {folder / name} is missing, or is a link, which is not "
                "followed: put the file itself there."
            )
    files = [CommitOperationAdd(name, folder / name) for name in names]
    try:
        api: Any = HfApi()
        api.create_repo(repo_id, private=True, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [*files, CommitOperationAdd(CARD_FILE, card.encode())],
            commit_message="Model and card by kdfast",
        )
    except Exception as error:  # whatever it is, the user must hear where the model is
        reason, remedy = _explain(error)
        place = shlex.quote(str(folder))
        raise UserError(
            f"The model is trained and stands in {folder}, but --push_to_hub {repo_id} failed, as "
            f"{reason}: {remedy}, then run python -m kdfast.card --model_dir {place} "
            f"--push_to_hub {repo_id}."
        ) from error
    return str(commit.repo_url)


def model_files(folder: Path) -> list[str]:
    """The names of the model's files in `folder`: configuration, weights, tokenizer."""
    weights = [MODEL_FILE]
    if not (folder / MODEL_FILE).exists():
        shards = read_json_object(folder / INDEX).get("weight_map")
        named = {str(each) for each in shards.values()} if isinstance(shards, dict) else set()
        weights = [INDEX, *sorted(filter(SHARD.fullmatch, named))]
        if len(weights) != 1 + max(1, len(named)):
            raise UserError(
                f"{folder} holds no {MODEL_FILE}, and its {INDEX} names no shards, or other files "
                "than shards: nothing is uploaded; restore the weights, or train again."
            )
    return ["config.json", *weights, *(each for each in TOKENIZER if (folder / each).exists())]


def _explain(error: Exception) -> tuple[str, str]:
    """Why the hub did not do it, and what to do: two parts of a sentence."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    what = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps it from the hub", "unset that"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token", "log in by hf auth login, or set HF_TOKEN"
    if status == 401:
        return "the hub does not know the token", "log in by hf auth login, or mend HF_TOKEN"
    if status == 403:
        return f"the token has no right to it ({what})", "log in by hf auth login with one that has"
    if status is None and isinstance(error, (HTTPError, OSError)):
        return f"{HfApi().endpoint} does not answer ({what})", "see to the network or HF_ENDPOINT"
    return f"the hub did not take it ({what})", "see to what it says"
