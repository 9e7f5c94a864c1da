"""What `publish_all` has done so far: one JSON file, whole after each entry, of one process at a time."""
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from timm_miil._atomic import write_file
from timm_miil._checks import cut, shown
from timm_miil._errors import HubError
from timm_miil._locks import locked

__all__ = ['FileFacts', 'Journal', 'Record', 'open_journal', 'read_journal']

FORMAT = 'timm-miil journal 1'
MAX_BYTES = 64 << 20
LOCK_SECONDS = 1.0  # for a run that is about to end
SHA256 = re.compile(r'[0-9a-f]{64}')


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """A file that was sent."""
    sha256: str
    size: int


@dataclasses.dataclass(frozen=True)
class Record:
    """What happened to one entry of the catalogue.

    Attributes:
        name: 'architecture.tag'.
        repo_id: 'owner/name'.
        endpoint: Address of the Hub.
        state: 'pushed', 'up to date' or 'failed'.
        time: When, in UTC.
        commit: The repository's head then; '' of a failure, as the next three.
        facts: Digest of what the files were made of, beside the source.
        source: URL or name of the original file.
        source_sha256: Its hash.
        files: What was sent, by name.
        error: Why it failed, in one line.
        notes: What somebody should know of the conversion, in one line.
    """
    name: str
    repo_id: str
    endpoint: str
    state: str
    time: str
    commit: str = ''
    facts: str = ''
    source: str = ''
    source_sha256: str = ''
    files: Mapping[str, FileFacts] = dataclasses.field(default_factory=dict)
    error: str = ''
    notes: str = ''


class Journal:
    """The records by name, in a file that has them all at any moment.

    Args:
        path: The file; made with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = dict(read_journal(path))

    def add(self, record: Record) -> None:
        """Write a record down, in place of an earlier one of that name.

        Raises:
            OSError: If the file cannot be written; it is then as it was.
        """
        self.records[record.name] = record
        entries = {
            name: {**vars(each), 'files': {file: vars(facts) for file, facts in each.files.items()}}
            for name, each in sorted(self.records.items())}
        write_file(self.path, json.dumps({'format': FORMAT, 'entries': entries}, indent=1, ensure_ascii=False) + '\n')


@contextlib.contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal, this process's alone while the block runs.

    Raises:
        HubError: If another process has it, or it is damaged.
        OSError: If its folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path.with_name(f'.{path.name}.lock'), seconds=LOCK_SECONDS))
        except BlockingIOError as error:
            raise HubError(
                f'another run is at work with the journal {path}; wait for its end, or give this one another journal.'
            ) from error
        yield Journal(path)


def read_journal(path: Path, *, must_exist: bool = False) -> Mapping[str, Record]:
    """The records of a journal by name; none if there is no file.

    Raises:
        FileNotFoundError: If there is no file and there must be one.
        HubError: If it is damaged.
    """
    if not path.exists() and not must_exist:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f'the journal must be a file that `timm-miil push --all` wrote, got {str(path)!r}.')
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f'it has more than {MAX_BYTES} bytes')
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict) or content.get('format') != FORMAT:
            raise ValueError(f'it does not begin as one of format {FORMAT!r}')
        return {name: _record(name, fields) for name, fields in content['entries'].items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise HubError(
            f'the journal {path} is damaged: {cut(str(error) or type(error).__name__, 200)}; move it away, and what is '
            f'on the Hub is found to be there.') from error


def _record(name: str, fields: Any) -> Record:
    files = {str(file): FileFacts(**facts) for file, facts in fields.pop('files').items()}
    record = Record(**fields, files=MappingProxyType(files))
    if wrong := [field for field, value in vars(record).items() if field != 'files' and not isinstance(value, str)]:
        raise ValueError(f'{wrong[0]} of {name} is {shown(getattr(record, wrong[0]))}')
    if record.name != name:
        raise ValueError(f'{name} has the record of {record.name}')
    for file, facts in files.items():
        if not isinstance(facts.sha256, str) or not SHA256.fullmatch(facts.sha256) or type(facts.size) is not int:
            raise ValueError(f'{file} of {name} has no hash and size: {shown(facts)}')
    return record
