"""Anonymous usage telemetry for Kedro: one event per command or session, and none after any no.

The module reads as the life of an event: what is known beforehand, the hooks that Kedro calls, the one function that
every event passes, then its rooms in the order in which it passes them: consent, identity, properties, masking and
the post. Below them are the files and the command line, `python -m kedro_telemetry`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

try:
    from pluggy import HookimplMarker

    cli_hook_impl, hook_impl = HookimplMarker("kedro_cli"), HookimplMarker("kedro")
except ImportError:  # a bare Python, where only the command line is of use
    cli_hook_impl = hook_impl = lambda function: function  # type: ignore[assignment]

__version__ = "1.0.0"

ENDPOINT = "https://heapanalytics.com/api/track"
APP_ID = "2388822444"
DEADLINE = 2.0  # seconds that a post may take, whatever hangs
BACK_OFF = 3600.0  # seconds without a post after one that ran into the deadline
LOCK_PATIENCE = 2.0  # seconds to wait for another process that writes the same file
LARGEST_FILE = 2**20  # bytes
LONGEST_TEXT = 1023  # characters that Heap takes in a key or a value

NOTICE = (
    "Anonymous usage data is sent to the Kedro team. To say no, set the environment variable DO_NOT_TRACK, write "
    "'consent: false' into a file .telemetry in your project, or run 'python -m kedro_telemetry disable'. A yes or no "
    "of yours hides this notice. 'python -m kedro_telemetry' shows what is sent. Read more at "
    "https://docs.kedro.org/en/stable/about/telemetry/"
)
USAGE = "usage: python -m kedro_telemetry [status | enable | disable | --help]"
HELP = f"""{USAGE}

  status    whether telemetry is on here and why, and what it would send (the default)
  enable    say yes for yourself in every project; a no said elsewhere is still a no
  disable   say no for yourself in every project"""

YES_WORDS = ("true", "yes", "on", "y", "1")
NO_WORDS = ("false", "no", "off", "n", "0")
MISSING_IDENTITY = "missing_user_identity"
NOT_YET = "(made with the first event)"
CI_VARIABLES = "GITLAB_CI GITHUB_ACTION BITBUCKET_BUILD_NUMBER JENKINS_URL CODEBUILD_BUILD_ID CIRCLECI TRAVIS BUILDKITE"
PROJECT_PROPERTIES = ("project_id", "tools", "example_pipeline")
PUBLIC_DATASETS = ("kedro.io.", "kedro_datasets.", "kedro_datasets_experimental.")
PUBLIC_VALIDATORS = ("pandera", "pydantic", "great_expectations", "kedro", "kedro_datasets")
MASK = "*****"
GLOBAL_GROUPS = ("cli", "create_cli", "global_commands")  # as kedro.framework.cli.cli calls them, from 0.18 to 1.x
LAST_WORDS = ("--help", "-h", "--version", "-V", "--")  # Kedro makes no sense of the words after them

logger = logging.getLogger("kedro_telemetry")
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)


# The hooks, in the order in which Kedro calls them ------------------------------------------------------------------
class KedroTelemetryHook:
    """The hooks of Kedro's command line and of its sessions."""

    def __init__(self) -> None:
        self.__name__ = "kedro-telemetry"  # so that pluggy knows the plugin in HOOKS and the entry point for the same
        self._command: list[str] | None = None  # that is running
        self._session: object = None  # the last one
        self._project_path: Path | None = None  # of either
        self._is_due = True  # what is running has not been reported

    @cli_hook_impl
    def before_command_run(self, project_metadata: Any, command_args: list[str]) -> None:
        """Remember the command, which is reported when it has ended or when a session in it has made its catalog."""
        with _harmless():
            self._project_path = project_metadata.project_path if project_metadata else None
            self._command, self._is_due = list(command_args), True

    @cli_hook_impl
    def after_command_run(self) -> None:
        """Report the command, unless a session in it was reported."""
        command, self._command = self._command, None
        is_due, self._is_due = self._is_due, True
        if is_due and command is not None:
            # The command has ended: Ctrl-C ends the wait, and must not change the exit status.
            with contextlib.suppress(KeyboardInterrupt):
                _send("CLI command", lambda: _command_properties(command, self._project_path), self._project_path)

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        """Remember the session's project. A session may make several contexts, and a context several catalogs."""
        with _harmless():
            self._project_path = context.project_path
            session = getattr(context, "_hook_manager", context)  # each session has a hook manager of its own
            if self._command is None and self._session is not session:
                self._is_due = True
            self._session = session

    @hook_impl
    def after_catalog_created(self, catalog: Any) -> None:
        """Report the session, once, and with it the command that made it."""
        is_due, self._is_due = self._is_due, False
        command, path = self._command, self._project_path
        if is_due:
            statistics = "Kedro Project Statistics"
            _send(statistics, lambda: _command_properties(command, path) | _project_statistics(catalog), path)


def send_telemetry_event(
    event_name: str, properties: dict[str, Any] | None = None, project_path: Path | None = None
) -> bool:
    """Send an event of another Kedro plugin, under the consent that holds for every event.

    Args:
        event_name: What happened, such as `kedro_skills_install`.
        properties: What belongs to it, and nothing personal. A value that is no text, number or boolean goes through
            `str`, None is left out. The base properties can't be overwritten.
        project_path: The root of the Kedro project that the event is about, if it is about one.

    Returns:
        True if Heap accepted the event, False otherwise. Never raises.
    """
    return _send(event_name, lambda: dict(properties or {}), project_path)


# The one door -------------------------------------------------------------------------------------------------------
def _send(name: str, collect: Callable[[], dict[str, Any]], project_path: Path | None) -> bool:
    """Take an event through consent, identity, properties and the post; there is no other way out of this module.

    `collect` gives the event's own properties, once consent is there. True if Heap accepted the event.
    """
    with _harmless():
        if os.environ.get("_KEDRO_COMPLETE"):  # TAB in a shell
            return False
        consent = _check_for_telemetry_consent(project_path)
        is_preview = bool(os.environ.get("KEDRO_TELEMETRY_DEBUG"))
        if consent is False:
            no = _find_consent(project_path)
            if is_preview:
                print(f"kedro-telemetry sends nothing, because of {no.source}", file=sys.stderr)
            elif no.is_unclear:
                logger.warning("Telemetry stays off: no plain yes or no in %s", no.source, extra={"markup": False})
            return False
        if not is_preview:
            if _back_off_end():
                return False
            if consent is None:
                logger.info(NOTICE)
        event = _make_event(name, collect(), project_path)
        if not is_preview:
            return _post(event)
        print(json.dumps(event, indent=2), file=sys.stderr)
    return False


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Whatever goes wrong inside is one line at DEBUG and none of Kedro's business."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):  # a user's logging may raise, too
            logger.debug("No event was sent: %s", type(error).__name__)


# Consent ------------------------------------------------------------------------------------------------------------
class Consent(NamedTuple):
    """What was said, yes, no or (None) nothing; by what; and whether a no is one that its author may not have meant."""

    answer: bool | None = None
    source: str = "nothing said"
    is_unclear: bool = False


def _check_for_telemetry_consent(project_path: Path | None) -> bool | None:
    """Whether events may be sent from the project at `project_path`, or from outside of any project (None).

    True where a yes was said, False where any no was said, None where nothing was. Writes nothing.
    """
    return _find_consent(project_path).answer


def _find_consent(project_path: Path | None) -> Consent:
    """The first no, else the first yes, of the environment, the user and the project."""
    found = Consent()
    for ask in (_environment_consent, _user_consent, _settings_consent, lambda: _project_consent(project_path)):
        consent = ask()
        if consent.answer is False:
            return consent
        found = consent if found.answer is None else found
    return found


def _environment_consent() -> Consent:
    """A variable that is set is a no, whatever it holds, the empty text included."""
    for name in ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY"):
        if name in os.environ:
            return Consent(False, f"the environment variable {name}")
    is_kedro_org = os.environ.get("GITHUB_REPOSITORY_OWNER") == "kedro-org"
    return Consent(False, "the environment variable GITHUB_REPOSITORY_OWNER") if is_kedro_org else Consent()


def _user_consent() -> Consent:
    """`consent` under [telemetry] in the user's telemetry.toml, where all but `true` is a no."""
    try:
        path = _user_file("telemetry.toml")
        content = _read(path) or b""
    except OSError as error:  # a file that is kept from its owner may hold a no; one that can't be there holds nothing
        return Consent(False, str(path), True) if isinstance(error, PermissionError) else Consent()
    mention = re.search(rb"^[^#\n]*consent", content, re.MULTILINE)
    data = _parse_toml(content) if mention else {}
    answer = _table(data, "telemetry").get("consent")
    if mention is None or (answer is None and data is not None):
        return Consent()
    line = content.count(b"\n", 0, mention.end()) + 1
    return Consent(answer is True, f"{path}, line {line}", not isinstance(answer, bool))


def _settings_consent() -> Consent:
    """Kedro's own switch in the settings that it has loaded for the project that runs: DISABLE_HOOKS_FOR_PLUGINS."""
    project = sys.modules.get("kedro.framework.project")
    package = getattr(project, "PACKAGE_NAME", None)
    no = Consent(False, f"DISABLE_HOOKS_FOR_PLUGINS in {package}.settings")
    try:
        is_no = package is not None and "kedro-telemetry" in project.settings.DISABLE_HOOKS_FOR_PLUGINS
    except Exception:
        return no
    return no if is_no else Consent()


def _project_consent(project_path: Path | None) -> Consent:
    """The file .telemetry in the project's root, or in the current directory where there is no project."""
    path = Path(project_path or "", ".telemetry")
    try:
        answer, line, is_plain = _parse_consent((_read(path) or b"").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        answer, line, is_plain = False, error.object.count(b"\n", 0, error.start) + 1, False
    except OSError:
        return Consent(False, str(path), True)
    return Consent() if answer is None else Consent(answer, f"{path}, line {line}", not is_plain)


QUOTED = r"\"[^\"\\]*\"|'[^']*'"
KEY = rf"({QUOTED}|\w[\w.-]*(?: [\w.-]+)*) *([:=])( *)(.*)"
VALUE = rf"({QUOTED}|[\w./~+](?:[^\s:#]|:(?=\S)|(?<=\S)#| (?=[^#]))*|) *(?:(?<![^ ])#.*)?"


def _parse_consent(text: str) -> tuple[bool | None, int, bool]:
    """What a .telemetry file says: its answer, None for nothing, the line of it, and whether it says it plainly.

    Plain are lines of `key: value` or of `key = value`, or one line of `{key: value}`, side by side, in which YAML can
    see nothing else. A file with anything more says yes to nothing, and no if consent is mentioned in it.
    """
    lines = [*enumerate(re.split(r"\r\n|\r|\n", text), 1)]
    lines = [(number, line) for number, line in lines if line.strip(" ") and line.strip(" ")[0] != "#"]
    if lines and lines[0][1].rstrip(" ") == "---":
        del lines[0]
    if len(lines) == 1 and (flow := re.fullmatch(r" *\{([^{}\[\]]*)\} *(?: #.*)?", lines[0][1])):
        lines = [(lines[0][0], item.strip(" ")) for item in flow[1].split(",")]
    answers: list[tuple[int, str]] = []
    layouts = set()  # indent and separator: where lines differ in them, or one is odd (None), YAML may see otherwise
    for number, line in lines:
        key = re.fullmatch(KEY, line.lstrip(" "))
        value = re.fullmatch(VALUE, key[4]) if key and line.isprintable() else None
        is_consent = key is not None and key[1].strip("\"'").lower() == "consent"
        is_plain = key and value and (is_consent or key[2] == "=" or key[3] or not key[4])
        layouts.add((len(line) - len(line.lstrip(" ")), key[2]) if key and is_plain else None)
        if is_consent or (not is_plain and re.search(r"consent|\"[^\"]*\\[xuU]", line, re.IGNORECASE)):
            answers.append((number, value[1].strip(" ").strip("\"'").lower() if value and is_consent else ""))
    no = [number for number, word in answers if word in NO_WORDS]
    unclear = [number for number, word in answers if word not in YES_WORDS or len(layouts) > 1 or None in layouts]
    if no or unclear:
        return False, (no or unclear)[0], bool(no)
    return (True, answers[0][0], True) if answers else (None, 0, True)


# Identity -----------------------------------------------------------------------------------------------------------
def _get_or_create_uuid(create: bool = True) -> str:
    """The user's UUID as 32 hex digits; made if need be and `create`, "" after a no and where none can be kept."""
    from uuid import UUID

    def valid(value: Any) -> str | None:
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            return UUID(value).hex
        return None

    if not create or _check_for_telemetry_consent(_find_project()) is not False:
        with contextlib.suppress(OSError):
            return _keep_id(_user_file("telemetry.toml"), ("telemetry",), "uuid", valid, create) or ""
    return ""


def _keep_id(path: Path, names: tuple[str, ...], key: str, valid: Callable[[Any], Any], create: bool) -> Any:
    """The id in the TOML file at `path`, in the table `names`; made if need be and `create`, None if there is none.

    However many processes ask at once, they all get the one that the file then has. OSError if it can't be kept.
    """
    if (found := valid(_table(_parse_toml(_read(path) or b""), *names).get(key))) is None and create:
        from uuid import uuid4

        with _locked(path.parent):
            if (found := valid(_table(_parse_toml(_read(path) or b""), *names).get(key))) is None:
                found = _set_in_file(path, names, key, uuid4().hex)
    return found


def _user_file(name: str) -> Path:
    """A file in the user's configuration folder for Kedro, OSError where there can be none."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", "~"), "kedro")
    elif sys.platform == "darwin":
        folder = Path(os.path.expanduser("~/Library/Application Support"))
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    if folder.parts[0] == "~":
        raise FileNotFoundError("there is no home folder")
    return folder / "kedro" / name


# Properties ---------------------------------------------------------------------------------------------------------
def _make_event(name: str, own: dict[str, Any], project_path: Path | None, create: bool = True) -> dict[str, Any]:
    """The body of a post, of the event's own properties and the base ones, which win.

    Unless `create`, nothing is written, and NOT_YET stands for what is missing.
    """
    from datetime import UTC, datetime

    identity = _get_or_create_uuid(create) or ("" if create else NOT_YET)
    base = _get_project_properties(identity, project_path, create)
    own = {key: value for key, value in _for_heap(own).items() if key not in PROJECT_PROPERTIES}
    return {
        "app_id": _get_heap_app_id(),
        "event": str(name)[:LONGEST_TEXT],
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "identity": identity or MISSING_IDENTITY,
        "properties": own | base,
    }


def _get_heap_app_id() -> str:
    """The application at Heap that events are sent to: Kedro's, or the one that HEAP_APPID_DEV names."""
    return os.environ.get("HEAP_APPID_DEV", APP_ID)


def _for_heap(properties: dict[str, Any]) -> dict[str, str | float | bool]:
    """`properties` as Heap takes them: values that are short texts, finite numbers or booleans, and never None."""
    result: dict[str, str | float | bool] = {}
    for key, value in properties.items():
        is_number = isinstance(value, int) or (isinstance(value, float) and abs(value) < float("inf"))
        if value is not None:
            result[str(key)[:LONGEST_TEXT]] = value if is_number else str(value)[:LONGEST_TEXT]
    return result


def _get_project_properties(user_uuid: str, project_path: Path | None, create: bool = True) -> dict[str, Any]:
    """The properties of every event; a project without an id gets one if `create`, and if nobody said no."""
    properties: dict[str, Any] = {
        "username": user_uuid,
        "project_version": None,
        "telemetry_version": __version__,
        "python_version": sys.version,
        "os": sys.platform,
        "is_ci_env": os.environ.get("CI") == "true" or any(map(os.environ.get, CI_VARIABLES.split())),
    }
    with contextlib.suppress(ImportError):
        from kedro import __version__ as kedro_version

        properties["project_version"] = kedro_version
    if project_path:
        with _harmless():
            properties |= _project_file_properties(Path(project_path, "pyproject.toml"), create)
    return _for_heap(properties)


def _project_file_properties(path: Path, create: bool) -> dict[str, Any]:
    """The properties that the project's pyproject.toml gives: `project_id`, `tools` and `example_pipeline`."""
    import hashlib

    kedro = _table(_parse_toml(_read(path) or b""), "tool", "kedro")
    project_id, package = None, kedro.get("package_name")
    if create:  # what Kedro runs, which may not be this project
        package = getattr(sys.modules.get("kedro.framework.project"), "PACKAGE_NAME", None)
    may_write = create and bool(kedro) and _check_for_telemetry_consent(path.parent) is not False
    with contextlib.suppress(OSError):
        project_id = _keep_id(path.resolve(), ("tool", "kedro_telemetry"), "project_id", lambda x: x, may_write)
    known = f"{project_id}{package or 'undefined_package_name'}".encode()
    missing = None if create else NOT_YET
    tools = kedro.get("tools")
    if isinstance(tools, str) and tools.strip()[:1] in ("[", "("):  # as Kedro writes it, a list in a text
        from ast import literal_eval

        with contextlib.suppress(Exception):
            tools = literal_eval(tools.strip())
    return {
        "project_id": missing if project_id is None else hashlib.sha512(known).hexdigest(),
        "tools": (", ".join(map(str, tools)) if isinstance(tools, (list, tuple)) else tools) or None,
        "example_pipeline": kedro.get("example_pipeline"),
    }


def _command_properties(command: list[str] | None, project_path: Path | None) -> dict[str, Any]:
    """`command` and `main_command`, masked; nothing where no command runs."""
    if command is None:
        return {}
    words = _mask([str(word) for word in command], in_project=project_path is not None)
    return {"command": " ".join(["kedro", *words]), "main_command": words[0] if words else "kedro"}


def _project_statistics(catalog: Any) -> dict[str, Any]:
    """How large the project is, and of what kinds its datasets are. Makes and loads none of them."""
    names = catalog.keys() if callable(getattr(catalog, "keys", None)) else catalog.list()
    names = [name for name in names if not name.startswith(("parameters", "params:"))]
    properties: dict[str, Any] = {"number_of_datasets": len(names)}
    with contextlib.suppress(Exception, SystemExit):  # this may run the user's code, here and below
        from kedro.framework.project import pipelines

        default = pipelines.get("__default__")
        nodes = None if default is None else len(default.nodes)
        properties |= {"number_of_pipelines": len(pipelines), "number_of_nodes": nodes}
    if hasattr(catalog, "get_type"):
        for kind, count in Counter(_dataset_types(catalog, names)).items():
            properties[f"dataset_type_count.{kind}"] = count
    if specs := getattr(catalog, "validator_specs", None):
        properties["number_of_validated_datasets"] = len(specs)
        libraries = [str(getattr(spec, "class_path", "")).partition(".")[0] for spec in specs.values()]
        for library, count in Counter(x if x in PUBLIC_VALIDATORS else "custom" for x in libraries).items():
            properties[f"validator_type_count.{library}"] = count
    return properties


def _dataset_types(catalog: Any, names: list[str]) -> Iterator[str]:
    """The type of each dataset, or `custom`. Kedro is slow to tell a type, so each declared one is asked once."""
    declared = getattr(catalog, "_lazy_datasets", {})
    known: dict[Any, str] = {}
    for name in names:
        key = str(declared[name].config.get("type")) if name in declared else (name,)
        if key not in known:
            known[key] = "custom"
            with contextlib.suppress(Exception, SystemExit):
                kind = catalog.get_type(name)
                known[key] = kind if kind.startswith(PUBLIC_DATASETS) else "custom"
        yield known[key]


# Masking ------------------------------------------------------------------------------------------------------------
def _mask(words: list[str], in_project: bool) -> list[str]:
    """The words of a command line, with MASK for each that neither Kedro nor an installed plugin defines."""
    if not words:
        return []
    level = _root_commands(in_project, with_plugins=not words[0].startswith("-"))
    path = 0
    while path < len(words) and (below := _subcommands(level, words[path])):
        level, path = below, path + 1
    takes: dict[str, int] = {}  # how many values each option takes
    for command, context in level:
        for option in (option for option in command.get_params(context) if option.param_type_name == "option"):
            count = 0 if option.is_flag or option.count else option.nargs
            takes |= dict.fromkeys((*option.opts, *option.secondary_opts), count)
    if path == 0 and words[0].partition("=")[0] not in takes:
        return [MASK]
    starters = sys.modules.get("kedro.framework.cli.starters")  # loaded whenever `kedro new` has run
    official = getattr(starters, "_OFFICIAL_STARTER_SPECS_DICT", getattr(starters, "_OFFICIAL_STARTER_SPECS", ()))
    masked, values, clear = words[:path], 0, ()
    for word in words[path:]:
        option, equals, value = word.partition("=")
        if values or option not in takes:
            masked.append(word if word in clear else MASK)
            values = len(words) if option in LAST_WORDS else max(values - 1, 0)
            clear = clear if values else ()
            continue
        clear = official if option in ("--starter", "-s") else ()
        masked += [option, value if value in clear else MASK] if equals else [option]
        values = len(words) if option in LAST_WORDS else 0 if equals else takes[option]
    return masked


def _root_commands(in_project: bool, with_plugins: bool) -> list[tuple[Any, Any]]:
    """The click groups of Kedro and of plugins, each with a context. The project's own `cli.py` is left out."""
    import click
    from kedro.framework.cli import cli

    names = [name for name in vars(cli) if in_project or name in GLOBAL_GROUPS]
    groups = [vars(cli)[name] for name in names if isinstance(vars(cli)[name], click.Group)]
    if with_plugins:
        from importlib.metadata import entry_points

        installed = entry_points()
        for scope in ("global", "project") if in_project else ("global",):
            for point in installed.select(group=f"kedro.{scope}_commands"):
                with contextlib.suppress(Exception):
                    if point.module in sys.modules:  # else Kedro could not load it, and has said so
                        groups.append(point.load())
    return [(group, click.Context(group, **group.context_settings)) for group in groups]


def _subcommands(level: list[tuple[Any, Any]], name: str) -> list[tuple[Any, Any]]:
    """The commands `name` of the groups in `level`, each with a context, but for those that the project defines."""
    import click
    from kedro.framework.project import PACKAGE_NAME

    found = []
    for group, context in level:
        with contextlib.suppress(Exception):  # no group, no such command, or one that can't be loaded
            command = group.get_command(context, name)
            if str(getattr(command.callback, "__module__", None)).partition(".")[0] != PACKAGE_NAME:
                settings = command.context_settings
                found.append((command, click.Context(command, info_name=name, parent=context, **settings)))
    return found


# The post -----------------------------------------------------------------------------------------------------------
def _post(event: dict[str, Any]) -> bool:
    """Post `event` to Heap and tell whether it was accepted, when the deadline has passed at the latest."""
    import threading

    body = json.dumps(event).encode()
    outcome: list[int | Exception] = []

    def work() -> None:
        try:
            outcome.append(_request(body))
        except Exception as error:
            outcome.append(error)

    # A name look-up has no time-out of its own, and a daemon thread keeps no process from ending.
    thread = threading.Thread(target=work, name="kedro-telemetry", daemon=True)
    thread.start()
    thread.join(DEADLINE)
    if not outcome:
        _start_back_off()
        raise TimeoutError
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    if outcome[0] != 200:
        logger.debug("Heap did not accept the event: HTTP status %s", outcome[0])
    return outcome[0] == 200


def _request(body: bytes) -> int:
    """The HTTP status that Heap answers to `body`. Proxies and HTTPS are all that it knows: no redirect, no reading."""
    import urllib.request

    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(urllib.request.HTTPSHandler(context=_tls_context()))
    headers = {"Content-Type": "application/json", "User-Agent": f"kedro-telemetry/{__version__}"}
    with opener.open(urllib.request.Request(ENDPOINT, body, headers), timeout=2 * DEADLINE) as response:
        return int(response.status)


def _tls_context() -> ssl.SSLContext:
    """Whom to trust: SSL_CERT_FILE, or a directory of hashed certificates, else the platform's store, else certifi."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    folder, chosen = ssl.get_default_verify_paths().capath, os.environ.get("SSL_CERT_FILE")
    if folder and not chosen and any(re.fullmatch(r"[0-9a-f]{8}\.\d+", name) for name in os.listdir(folder)):
        context.load_verify_locations(capath=folder)  # each is read when it is needed, which costs nothing
        return context
    context.load_default_certs()
    if not chosen and not context.cert_store_stats()["x509_ca"]:
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context


_back_off_start = 0.0  # for where the stamp can't be written


def _start_back_off() -> None:
    """Stamp the time in a file for this user, or in this process where there can be no file."""
    global _back_off_start
    try:
        path = _user_file("telemetry.backoff")
        with _locked(path.parent):
            _write(path, f"{time.time()}\n".encode())
    except OSError:
        _back_off_start = time.time()


def _back_off_end() -> float:
    """When a post may be tried again, in seconds since the epoch; 0.0 for at once."""
    stamps = [_back_off_start]
    with contextlib.suppress(OSError, ValueError):
        path = _user_file("telemetry.backoff")
        if content := _read(path):
            stamps = [float(content), path.stat().st_mtime]
    now = time.time()
    return min(stamps) + BACK_OFF if all(0 <= now - stamp < BACK_OFF for stamp in stamps) else 0.0


# Files --------------------------------------------------------------------------------------------------------------
def _read(path: Path) -> bytes | None:
    """The content of the file at `path`, None where there is no file, OSError for what can't be read in no time."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise OSError("no file, or too large")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    """Make `content` that of the file at `path`, whole or not at all; mode, owner and links stay. OSError if not."""
    path = path.resolve()
    old = os.stat(path) if path.exists() else None
    if old and (old.st_nlink > 1 or not old.st_mode & 0o222 or not os.access(path, os.W_OK)):
        raise PermissionError(f"{path} is read-only, or has another name")
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        with open(temporary, "xb") as file:
            if old:
                os.chmod(temporary, stat.S_IMODE(old.st_mode))
                if hasattr(os, "chown"):
                    os.chown(temporary, old.st_uid, old.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing in `folder`, made if need be; without locks (Windows) the last writer wins."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            patience = time.monotonic() + LOCK_PATIENCE
            while time.monotonic() < patience:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.005)
                except OSError:  # a file system without locks
                    break
        yield


def _parse_toml(content: bytes) -> dict[str, Any] | None:
    """The TOML document `content`, None where it is none."""
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError):
        return None


def _table(data: Any, *names: str) -> dict[str, Any]:
    """The table `names` of a TOML document, empty where there is none."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _set_in_file(path: Path, names: tuple[str, ...], key: str, value: str | bool) -> str | bool | None:
    """Set `key` in the table `names` of the TOML file at `path`, and no other byte; gives `value`, None if it can't be.

    Every place that may be right is tried, and the first that makes the wanted document is taken. The user's
    telemetry.toml starts anew where there is none, as when it is not TOML.
    """
    content = _read(path) or b""
    wanted = _parse_toml(content)
    table: Any = wanted
    for name in names:
        table = table.setdefault(name, {}) if isinstance(table, dict) else None
    if isinstance(table, dict):
        table[key] = value
        for edited in _toml_edits(content.decode(), names, key, json.dumps(value)):
            # As JSON, in which order is nothing and nan is nan.
            if len({json.dumps(x, sort_keys=True, default=repr) for x in (_parse_toml(edited), wanted)}) == 1:
                _write(path, edited)
                return value
    if names == ("telemetry",):
        _write(path, f"[telemetry]\n{key} = {json.dumps(value)}\n".encode())
        return value
    return None


def _toml_edits(text: str, names: tuple[str, ...], key: str, value: str) -> Iterator[bytes]:
    """`text` with `key = value` for the key's old value, under the header of the table `names`, or in a new table."""
    newline = "\r\n" if "\r\n" in text else "\n"
    line = f"{key} = {value}{newline}"
    values = r"(\"[^\"\n]*\"|'[^'\n]*'|\[[^]\n]*\]|\{[^}\n]*\}|[^\s#,}]+)"
    for old in re.finditer(rf"\b{key}[\"']?[ \t]*=[ \t]*{values}", text):
        yield (text[: old.start(1)] + value + text[old.end(1) :]).encode()
    for header in re.finditer(rf"^[ \t]*\[.*{names[-1]}.*(?:\n|\Z)", text, re.MULTILINE):
        gap = "" if header[0].endswith("\n") else newline
        yield (text[: header.end()] + gap + line + text[header.end() :]).encode()
    gap = newline if text.endswith("\n") else 2 * newline
    yield ((text + gap if text else "") + f"[{'.'.join(names)}]{newline}{line}").encode()


# The command line ---------------------------------------------------------------------------------------------------
def main(arguments: list[str]) -> int:
    """Run `python -m kedro_telemetry` with `arguments`; gives the exit status."""
    if arguments == ["--help"]:
        print(HELP)
    elif arguments in ([], ["status"]):
        _print_status(_find_project())
    elif arguments in (["enable"], ["disable"]):
        return _choose(arguments[0] == "enable")
    else:
        print(USAGE, file=sys.stderr)
        return 2
    return 0


def _choose(consent: bool) -> int:
    """Keep the user's choice, and say what it comes to here; gives the exit status."""
    try:
        path = _user_file("telemetry.toml")
        with _locked(path.parent):
            _set_in_file(path, ("telemetry",), "consent", consent)
    except OSError as error:
        print(f"Your choice can't be kept, and nothing has changed: {error}", file=sys.stderr)
        return 1
    print(f"You said {'yes' if consent else 'no'} to telemetry, in every project of yours: {path}")
    found = _find_consent(_find_project())
    if consent and not found.answer:
        print(f"A no is still a no, and here telemetry is off because of {found.source}")
    return 0


def _print_status(project: Path | None) -> None:
    """Print where the user stands. Writes and sends nothing, and runs no code of the project."""
    consent, held_back = _find_consent(project), _back_off_end()
    is_off, until = consent.answer is False, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held_back))
    file: object = "no file, as there is no home folder"
    with contextlib.suppress(OSError):
        file = _user_file("telemetry.toml")
    name, command = "CLI command", {"command": f"kedro {MASK}", "main_command": MASK}
    print(f"Telemetry:  {'off' if is_off else 'on'} here, because of {consent.source}")
    print(f"Identity:   {_get_or_create_uuid(create=False) or NOT_YET} in {file}")
    print(f"Project:    {project or 'none here'}")
    if project:
        path = project / "pyproject.toml"
        project_id = _table(_parse_toml(_read(path) or b""), "tool", "kedro_telemetry").get("project_id", NOT_YET)
        name, command = "Kedro Project Statistics", {"command": "kedro run", "main_command": "run"}
        print(f"Project id: {project_id} in {path}")
        print(
            "            Not looked at, as it would run the project's code: DISABLE_HOOKS_FOR_PLUGINS, the statistics"
        )
    print(f"Endpoint:   {ENDPOINT}")
    print(f"Back-off:   {f'nothing is sent until {until}' if held_back else 'none'}\n")
    print(f"A `kedro run` here {'sends nothing; with telemetry on it' if is_off else ''} would send:")
    print(json.dumps(_make_event(name, command, project, create=False), indent=2))


def _find_project() -> Path | None:
    """The root of the Kedro project around the current directory, as Kedro finds it."""
    with contextlib.suppress(OSError):
        for folder in (Path.cwd(), *Path.cwd().parents):
            with contextlib.suppress(OSError):
                if b"[tool.kedro]" in (_read(folder / "pyproject.toml") or b""):
                    return folder
    return None


# The logger is one in a process: a copy vendored into a project shares its hook with an installed one.
telemetry_hook: KedroTelemetryHook = vars(logger).setdefault("hook", KedroTelemetryHook())
plugin = api = sys.modules[f"{__name__}.plugin"] = sys.modules[f"{__name__}.api"] = sys.modules[__name__]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
