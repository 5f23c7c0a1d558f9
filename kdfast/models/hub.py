"""Where a model's files are: in a folder, or on the hub and then in the hub's own cache."""

from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.common.files import listed

# The files of a model folder that are read; weights in safetensors only, never a pickle.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Pickled weights, whole or in parts, as transformers names them.
PICKLES = "pytorch_model*.bin"
# Author and title of the hub's own pull requests that add safetensors to a model.
CONVERTER, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
# A name that is no name of the hub, no network, no such model, no room on the disk.
HUB_ERRORS = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError)


def local_folder(name: str, role: str) -> Path:
    """The folder that holds model `name`: itself, or a hub model's files in the hub's own cache.

    For a hub model whose weights are a pickle alone, the files of its conversion, if the hub's bot
    has made one. Raises UserError, naming `role` (such as "--teacher"), where there is no model.
    """
    heartbeat.report(f"loading {name}", heartbeat.LONG)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{role} {name} holds no config.json: name a folder that "
                "save_pretrained has written."
            )
        for path in folder.iterdir():
            if path.is_fifo() or path.is_char_device():  # reading it would have no end
                raise UserError(f"{role} {name} holds {path.name}, which is no file: remove it.")
        return folder
    if folder.exists():
        raise UserError(f"{role} {name} is a file: name the model's folder.")
    try:
        folder = Path(snapshot_download(name, allow_patterns=MODEL_FILES))
        if not listed(folder, "*.safetensors"):
            folder = _conversion(name) or folder
        return folder
    except HUB_ERRORS as error:
        raise UserError(
            f"{role} {name} is neither a folder nor a model that the hub gave "
            f"({type(error).__name__}): check the name and the network, or name a local folder."
        ) from error


def without_safetensors(folder: Path, name: str, role: str) -> UserError:
    """The error for the model `name`, whose `folder` holds no weights in safetensors."""
    remedy = "name a folder with a config.json and the weights in safetensors."
    if listed(folder, PICKLES):
        remedy = (
            "those in pytorch_model.bin are a pickle, which may hold code and is never read here; "
            f"python -m kdfast.doctor --convert {name} makes model.safetensors of it."
        )
    elif not Path(name).expanduser().is_dir():
        remedy = (
            f"if they are in pytorch_model.bin, python -m kdfast.doctor --convert {name} makes a "
            "folder with model.safetensors, to be named instead."
        )
    return UserError(f"{role} {name} does not load (no weights in safetensors): {remedy}")


@cache
def _conversion(name: str) -> Path | None:
    """The files of a hub model as the hub's bot has converted it, in a pull request not yet merged.

    None where there is none, or where the pickle that it was made from is not the model's.
    """
    try:
        revisions = _conversions(name)
    except Exception:  # the hub has no discussions of this model, or does not answer
        revisions = []
    for revision in revisions:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
        if listed(folder, "*.safetensors"):
            return folder
    return None


def _conversions(name: str) -> list[str]:
    """The revisions that may hold a model's conversion; offline, those that are in the cache."""
    if constants.HF_HUB_OFFLINE:
        repo = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
        return [f"refs/pr/{path.name}" for path in (repo / "refs" / "refs" / "pr").glob("*")]
    api = HfApi()
    found = api.get_repo_discussions(
        name, discussion_type="pull_request", discussion_status="open", author=CONVERTER
    )
    revisions = [
        each.git_reference
        for each in found
        if each.git_reference
        and (each.title, each.author, each.status) == (CONVERSION, CONVERTER, "open")
    ]
    own = _pickles_of(api, name, None)
    return [revision for revision in revisions if _pickles_of(api, name, revision) == own]


def _pickles_of(api: HfApi, name: str, revision: str | None) -> dict[str, str | None]:
    """The pickled weights of a revision and the hashes of their content."""
    files = api.model_info(name, revision=revision, files_metadata=True).siblings or []
    return {
        each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id
        for each in files
        if Path(each.rfilename).match(PICKLES)
    }
