"""Anonymous usage telemetry for Kedro: one event per command or session, and none after any no.

It reads as the life of an event: hooks, the one door, its rooms (consent, identity, properties, masking, post), files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

try:
    from pluggy import HookimplMarker as _hook
except ImportError:  # a bare Python, where only the command line is of use
    _hook = lambda project_name: lambda function: function  # type: ignore # noqa: E731

__version__ = "1.0.0"
ENDPOINT, APP_ID = "https://heapanalytics.com/api/track", "2388822444"
DEADLINE, BACK_OFF, LOCK_PATIENCE = 2.0, 3600.0, 2.0  # seconds: for a post, without one after that, for a file's lock
LARGEST_FILE, LONGEST_TEXT = 2**20, 1023  # bytes; characters that Heap takes in a key or a value
NOTICE = "Anonymous usage data is sent to the Kedro team. To say no, set the environment variable DO_NOT_TRACK, write \
'consent: false' into a file .telemetry in your project, or run 'python -m kedro_telemetry disable'. A yes or no of \
yours hides this notice. 'python -m kedro_telemetry' shows what is sent. Read more at \
https://docs.kedro.org/en/stable/about/telemetry/"
HELP = """usage: python -m kedro_telemetry [status | enable | disable | --help]\n
  status    whether telemetry is on here and why, and what it would send (the default)
  enable    say yes for yourself in every project; a no said elsewhere is still a no
  disable   say no for yourself in every project"""
YES_WORDS, NO_WORDS = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
CI_VARIABLES = "GITLAB_CI GITHUB_ACTION BITBUCKET_BUILD_NUMBER JENKINS_URL CODEBUILD_BUILD_ID CIRCLECI TRAVIS BUILDKITE"
PUBLIC_DATASETS = ("kedro.io.", "kedro_datasets.", "kedro_datasets_experimental.")
PUBLIC_VALIDATORS = ("pandera", "pydantic", "great_expectations", "kedro", "kedro_datasets")
GLOBAL_GROUPS = ("cli", "create_cli", "global_commands")  # as kedro.framework.cli.cli calls them, from 0.18 to 1.x
LAST_WORDS = ("--help", "-h", "--version", "-V", "--")  # Kedro makes no sense of the words after them
MASK, NOT_YET = "*****", "(made with the first event)"
QUOTED = r"\"[^\"\\]*\"|'[^']*'"
PLAIN_KEY = rf"{QUOTED}|\w[\w.-]*(?: [\w.-]+)*"
PLAIN_VALUE = rf"{QUOTED}|[\w./~+](?:[^\s:#]|:(?=\S)|(?<=\S)#| +(?=[^ #]))*|"
PLAIN_LINE = rf"( *)({PLAIN_KEY}) *([:=])( *+)({PLAIN_VALUE}) *(?:(?<![^ ])#.*)?"
REFUSED_BY_YAML = "[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
TOML_VALUE = r"(?s:\"{3}.*?\"{3}|'{3}.*?'{3}|\"(?:\\.|[^\"\\\n])*\"|'[^'\n]*'|\[.*?\]|\{[^}\n]*\}|[^\s#,}]+)"
Properties = dict[str, Any]
Consent = tuple[bool | None, str, bool]  # yes, no or (None) nothing; by what; is it a no that may not be meant as one?
NOTHING_SAID: Consent = (None, "nothing said", False)
logger = logging.getLogger("kedro_telemetry")
logger.setLevel(logger.level or logging.INFO)


# The hooks, in the order in which Kedro calls them ------------------------------------------------------------------
class KedroTelemetryHook:
    """The hooks of Kedro's command line and of its sessions, and what they remember of the one that is running."""

    __name__ = "kedro-telemetry"  # so that pluggy knows the plugin in HOOKS and the entry point for the same
    _command: list[str] | None = None
    _hook_manager: Any = None
    _project_path: Path | None = None
    _is_unreported = True
    back_off_start = 0.0

    @_hook("kedro_cli")
    def before_command_run(self, project_metadata: Any, command_args: list[str]) -> None:
        """Remember the command `command_args` and the project of `project_metadata`, None for none. Never raises."""
        with suppress(Exception):
            self._project_path = project_metadata.project_path if project_metadata else None
            self._command, self._is_unreported = [str(word) for word in command_args], True

    @_hook("kedro_cli")
    def after_command_run(self) -> None:
        """Report the command that has ended, unless a session in it was reported. Never raises."""
        is_unreported, command, path = self._is_unreported, self._command, self._project_path
        self._is_unreported, self._command = True, None
        if is_unreported and command is not None:
            no = re.match(r"(?i)new .*(?:--telemetry|-tc)[ =]no?( |$)", " ".join(command))
            with suppress(KeyboardInterrupt):  # it ends the wait, and not the command, which has ended
                _send("CLI command", lambda: _command_properties(command, path), path, no="--telemetry" if no else "")

    @_hook("kedro")
    def after_context_created(self, context: Any) -> None:
        """Remember the session of `context` by its hook manager, as it may make several contexts. Never raises."""
        with suppress(Exception):
            self._project_path, hook_manager = context.project_path, getattr(context, "_hook_manager", context)
            self._is_unreported |= self._command is None and self._hook_manager is not hook_manager
            self._hook_manager = hook_manager

    @_hook("kedro")
    def after_catalog_created(self, catalog: Any) -> None:
        """Report the session that made `catalog`, its first, and with it the command that it is in. Never raises."""
        is_unreported, command, path = self._is_unreported, self._command, self._project_path
        self._is_unreported, name = False, "Kedro Project Statistics"
        if is_unreported:
            _send(name, lambda: _command_properties(command, path) | _project_statistics(catalog), path)


def send_telemetry_event(
    event_name: str, properties: Properties | None = None, project_path: Path | None = None
) -> bool:
    """Send an event of another Kedro plugin, under the consent that holds for every event. Never raises.

    Args: `event_name` tells what happened, such as `kedro_skills_install`. `properties` belong to it; nothing personal
        may be in them, and they can't overwrite the base ones. `project_path` is the root of its project, if any.
    Returns: True if Heap accepted the event, False otherwise.
    """
    return _send(event_name, lambda: dict(properties or {}), project_path)


# The one door -------------------------------------------------------------------------------------------------------
def _send(name: str, collect: Callable[[], Properties], project_path: Path | None, no: str = "") -> bool:
    """Take an event through consent, identity, properties and post, the only way out; True if Heap accepted it.

    `collect` gives the event's own properties once consent is there; `no` is a no that is part of what is reported.
    """
    try:
        is_preview = os.environ.get("KEDRO_TELEMETRY_DEBUG")
        if os.environ.get("_KEDRO_COMPLETE"):  # TAB in a shell
            return False
        if (consent := not no and _check_for_telemetry_consent(project_path)) is False:
            source, is_unclear = (no, False) if no else _find_consent(project_path)[1:]
            if is_preview:
                print(f"kedro-telemetry sends nothing, because of {source}", file=sys.stderr)
            elif is_unclear:
                logger.warning("Telemetry stays off: no plain yes or no in %s", source, extra={"markup": False})
        elif is_preview:
            print(json.dumps(_make_event(name, collect(), project_path), indent=2), file=sys.stderr)
        elif not _back_off_end():
            if consent is None:
                logger.info(NOTICE)
            return _post(_make_event(name, collect(), project_path))
    except (Exception, SystemExit) as error:  # rich ends the process where the terminal is gone
        with suppress(Exception, SystemExit):
            logger.debug("An event was lost: %s", type(error).__name__)
    return False


# Consent ------------------------------------------------------------------------------------------------------------
def _check_for_telemetry_consent(project_path: Path | None) -> bool | None:
    """True if a yes was said to events from `project_path` (None for the current directory), False if any no was."""
    return _find_consent(project_path)[0]


def _find_consent(project_path: Path | None) -> Consent:
    """The first no, else the first yes, of the environment, the user, the settings and the file of the project."""
    names = [name for name in ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY") if name in os.environ]
    names += ["GITHUB_REPOSITORY_OWNER"] * (os.environ.get("GITHUB_REPOSITORY_OWNER") == "kedro-org")
    if names:  # whatever they hold, the empty text included
        return False, f"the environment variable {names[0]}", False
    said = [_user_consent(), _settings_consent(), _project_consent(project_path)]
    return next((no for no in said if no[0] is False), next((yes for yes in said if yes[0]), NOTHING_SAID))


def _user_consent() -> Consent:
    """`consent` under [telemetry] in the user's telemetry.toml, where all but `true` is a no."""
    path = _user_file("telemetry.toml")
    try:
        content = _read(path).replace(b"\0", b"")  # as in UTF-16
    except OSError:  # a no may be in a file, but not in a directory
        return NOTHING_SAID if path.exists() and not path.is_file() else (False, str(path), True)
    mentions = [*re.finditer(rb"consent|\\[uU]", content)]
    table = _toml(content, "telemetry") if mentions else {}
    if (answer := "not TOML" if table is None else table.get("consent")) is None:
        return NOTHING_SAID
    line = content.count(b"\n", 0, mentions[-1].start()) + 1
    return answer is True, f"{path}, line {line}", not isinstance(answer, bool)


def _settings_consent() -> Consent:
    """Kedro's own switch, DISABLE_HOOKS_FOR_PLUGINS, in the settings that it has loaded for the project that runs."""
    from importlib.util import find_spec

    project: Any = sys.modules.get("kedro.framework.project")
    if (package := getattr(project, "PACKAGE_NAME", None)) is None:
        return NOTHING_SAID
    name = f"{package}.settings"
    with suppress(Exception):  # Kedro goes on without settings that can't be imported, and a no in them
        is_read = name in sys.modules or find_spec(name) is None
        if is_read and "kedro-telemetry" not in project.settings.DISABLE_HOOKS_FOR_PLUGINS:
            return NOTHING_SAID
    return False, f"DISABLE_HOOKS_FOR_PLUGINS in {name}", False


def _project_consent(project_path: Path | None) -> Consent:
    """The file .telemetry in the project's root, or in the current directory where there is no project."""
    path = os.path.join(project_path or os.curdir, ".telemetry")
    try:
        answer, line, is_plain = _parse_consent(_read(Path(path)).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        answer, line, is_plain = False, error.object.count(b"\n", 0, error.start) + 1, False
    except OSError:
        return False, os.path.abspath(path), True
    return NOTHING_SAID if answer is None else (answer, f"{os.path.abspath(path)}, line {line}", not is_plain)


def _parse_consent(text: str) -> tuple[bool | None, int, bool]:
    """What a .telemetry file says: its answer, None for nothing, the line of it, and whether it says it plainly.

    Plain are lines of `key: value` or of `key = value`, or one `{key: value}`, in which YAML can see nothing else. A
    file with anything more says yes to nothing, and no if consent is mentioned in it.
    """
    lines = [(n, line) for n, line in enumerate(text.replace("\0", "").splitlines(), 1) if re.match(" *[^ #]", line)]
    lines = lines[lines[:1] != [] and lines[0][1].rstrip(" ") == "---" :]
    if len(lines) == 1 and (flow := re.fullmatch(r" *\{([^{}\[\]#]*)\} *(?: #.*)?", lines[0][1])):
        lines = [(lines[0][0], item.strip(" ")) for item in flow[1].split(",")]
    said, layouts = [], ["odd"] * bool(re.search(REFUSED_BY_YAML, text))  # odd: YAML may see something else in it
    for number, line in lines:
        plain = re.fullmatch(PLAIN_LINE, line) if len(line) <= 1024 else None
        indent, key, separator, blanks, value = plain.groups() if plain else ("",) * 5
        key, value = (x[1:-1] if x[:1] in ("'", '"') else x.strip(" ") for x in (key, value))
        is_plain = plain and (key.lower() == "consent" or separator == "=" or blanks or not value)
        layouts.append(indent + separator if is_plain else "odd")
        if key.lower() == "consent" or (not is_plain and re.search(r"(?i)consent|\"[^\"]*\\([xu]|$)", line)):
            said.append((number, value.lower()))
    no = [n for n, word in said if word in NO_WORDS]
    unclear = [n for n, word in said if word not in YES_WORDS or "odd" in layouts or len({*layouts}) > 1]
    if no or unclear:
        return False, (no or unclear)[0], bool(no)
    return (True, said[0][0], True) if said else (None, 0, True)


# Identity -----------------------------------------------------------------------------------------------------------
def _get_or_create_uuid(create: bool | None = None) -> str:
    """The user's UUID as 32 hex digits, "" where none is; made if `create`, by default unless a no was said."""
    if create is not None or _check_for_telemetry_consent(_find_project()) is not False:
        with suppress(OSError):
            return _keep_id(_user_file("telemetry.toml"), ("telemetry",), "uuid", create is not False) or ""
    return ""


def _keep_id(path: Path, names: tuple[str, ...], key: str, create: bool) -> Any:
    """The id at `key` in the TOML file at `path`, one for all that ask at once, made if `create`; None for none."""
    from uuid import UUID, uuid4

    found = (_toml(_read(path), *names) or {}).get(key)
    with suppress(AttributeError, TypeError, ValueError):
        return found if key == "project_id" and found is not None else UUID(found).hex  # a project's may be any text
    if not create:
        return None
    with _locked(path.parent):
        if (found := _keep_id(path, names, key, create=False)) is None:
            _set_in_file(path, names, key, found := uuid4().hex)
    return found


def _user_file(name: str) -> Path:
    """A file in the user's configuration folder for Kedro, which can't be there where there is no home folder."""
    windows, xdg = os.path.join(os.environ.get("LOCALAPPDATA", ""), "kedro"), os.environ.get("XDG_CONFIG_HOME", "")
    folders = {"win32": windows, "darwin": "~/Library/Application Support"}
    folder = os.path.expanduser(folders.get(sys.platform, xdg if os.path.isabs(xdg) else "~/.config"))
    return Path(folder if os.path.isabs(folder) else f"{os.devnull}/no home folder", "kedro", name)


# Properties ---------------------------------------------------------------------------------------------------------
def _make_event(name: str, own: Properties, project_path: Path | None, create: bool = True) -> Properties:
    """The body of a post; unless `create`, nothing is written for it, and NOT_YET stands for what is missing."""
    now, identity = time.time(), _get_or_create_uuid(create) or ("" if create else NOT_YET)
    base = {"project_id": NOT_YET} if project_path and not create else {}
    base |= _get_project_properties(identity, project_path, create)
    own = {key: x for key, x in _for_heap(own).items() if key not in ("project_id", "tools", "example_pipeline")}
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06}Z"
    event = {"app_id": _get_heap_app_id(), "event": str(name)[:LONGEST_TEXT], "timestamp": timestamp}
    return event | {"identity": identity or "missing_user_identity", "properties": own | base}


def _get_heap_app_id() -> str:
    """The application at Heap that events are sent to: Kedro's, or the one that HEAP_APPID_DEV names."""
    return os.environ.get("HEAP_APPID_DEV", APP_ID)


def _for_heap(properties: Properties) -> Properties:
    """`properties` as Heap takes them: values that are short texts, finite numbers or booleans, and never None."""
    some = {str(key)[:LONGEST_TEXT]: x for key, x in properties.items() if x is not None}
    numbers = {key: x for key, x in some.items() if isinstance(x, (int, float)) and abs(x) < 1e308}
    return {key: str(x)[:LONGEST_TEXT] for key, x in some.items()} | numbers


def _get_project_properties(user_uuid: str, project_path: Path | None, create: bool | None = None) -> Properties:
    """The properties of every event; a project gets an id if `create`, by default unless a no was said."""
    from hashlib import sha512

    properties: Properties = {"username": user_uuid}
    with suppress(ImportError):
        properties["project_version"] = __import__("kedro").__version__
    properties |= {"telemetry_version": __version__, "python_version": sys.version, "os": sys.platform}
    properties["is_ci_env"] = os.environ.get("CI") == "true" or any(map(os.environ.get, CI_VARIABLES.split()))
    path = Path(project_path or os.devnull, "pyproject.toml")
    with suppress(OSError):
        if kedro := _toml(_read(path), "tool", "kedro"):
            tools = str(kedro.get("tools") or "")  # in which Kedro writes a list
            properties["tools"] = ", ".join(re.findall(r"[^][()'\",\s][^][()'\",]*", tools)) or None
            properties["example_pipeline"] = kedro.get("example_pipeline")
            running = getattr(sys.modules.get("kedro.framework.project"), "PACKAGE_NAME", None)
            package = kedro.get("package_name") if create is False else running
            create = _check_for_telemetry_consent(project_path) is not False if create is None else create
            if (found := _keep_id(path, ("tool", "kedro_telemetry"), "project_id", create)) is not None:
                properties["project_id"] = sha512(f"{found}{package or 'undefined_package_name'}".encode()).hexdigest()
    return _for_heap(properties)


def _project_statistics(catalog: Any) -> Properties:
    """How large the project is, and of what kinds its datasets are. Makes and loads none of them."""
    from kedro.framework import project

    names = catalog.keys() if callable(getattr(catalog, "keys", None)) else catalog.list()
    names = [name for name in names if not name.startswith(("parameters", "params:"))]
    counts: Counter[str] = Counter({"number_of_datasets": len(names)})
    with suppress(Exception, SystemExit):  # this may run the user's code, here and below
        counts["number_of_pipelines"] = len(project.pipelines)
        counts["number_of_nodes"] = len(project.pipelines["__default__"].nodes)
    declared, known = getattr(catalog, "_lazy_datasets", {}), {}  # by declared type, as Kedro is slow to tell one
    for name in names if hasattr(catalog, "get_type") else []:
        key = str(declared[name].config.get("type")) if name in declared else (name,)
        if key not in known:
            known[key] = "custom"
            with suppress(Exception, SystemExit):
                kind = str(key if str(key).startswith(f"{project.PACKAGE_NAME}.") else catalog.get_type(name))
                known[key] = kind if kind.startswith(PUBLIC_DATASETS) else "custom"
        counts[f"dataset_type_count.{known[key]}"] += 1
    for spec in (getattr(catalog, "validator_specs", None) or {}).values():
        library = str(getattr(spec, "class_path", "")).partition(".")[0]
        counts["number_of_validated_datasets"] += 1
        counts[f"validator_type_count.{library if library in PUBLIC_VALIDATORS else 'custom'}"] += 1
    return dict(counts)


# Masking ------------------------------------------------------------------------------------------------------------
def _command_properties(command: list[str] | None, project_path: Path | None, with_plugins: bool = False) -> Properties:
    """`command` and `main_command`, with MASK for each word that neither Kedro nor an installed plugin defines."""
    if command is None:
        return {}
    rest, masked = command, list[str]()
    level = _root_groups(project_path is not None, with_plugins)
    while rest and (below := _subcommands(level, rest[0])):
        level, masked, rest = below, [*masked, rest[0]], rest[1:]
    value_counts = {"--help": 0, "-h": 0}
    for option in (param for command in level for param in command.params if param.param_type_name == "option"):
        count = 0 if option.is_flag or option.count else option.nargs
        value_counts |= dict.fromkeys((*option.opts, *option.secondary_opts), count)
    if not masked and rest and rest[0].partition("=")[0] not in value_counts:
        rest = rest[:1]  # of an unknown command, nothing is told
    starters = sys.modules.get("kedro.framework.cli.starters")  # loaded whenever `kedro new` has run
    specs: Any = getattr(starters, "_OFFICIAL_STARTER_SPECS_DICT", getattr(starters, "_OFFICIAL_STARTER_SPECS", {}))
    values_left, clear_values = 0, []
    for word in rest:
        option, equals, value = word.partition("=")
        is_last = option in LAST_WORDS and not value_counts.get(option)
        if not (values_left or option in value_counts or with_plugins):  # a plugin may know it, and costs time to ask
            return _command_properties(command, project_path, with_plugins=True)
        if values_left or option not in value_counts:
            masked.append(word if values_left and word in clear_values else MASK)
            values_left = len(rest) if is_last else max(values_left - 1, 0)
        else:
            clear_values = [x for x in specs if specs[x].origin == "kedro"] if option in ("--starter", "-s") else []
            masked += [option, value if value in clear_values else MASK] if equals else [option]
            values_left = len(rest) if is_last else 0 if equals else value_counts[option]
    return {"command": " ".join(["kedro", *masked]), "main_command": [*masked, "kedro"][0]}


def _root_groups(in_project: bool, with_plugins: bool) -> list[Any]:
    """The click groups of Kedro and of plugins; the project's own `cli.py` is left out."""
    from importlib.metadata import entry_points

    import click
    from kedro.framework.cli import cli

    groups = [x for key, x in vars(cli).items() if isinstance(x, click.Group) and (in_project or key in GLOBAL_GROUPS)]
    scopes = ("global", "project")[: with_plugins * (1 + in_project)]
    for point in [x for scope in scopes for x in entry_points(group=f"kedro.{scope}_commands")]:
        with suppress(Exception):
            if point.module in sys.modules:  # else Kedro could not load it, and has said so
                groups.append(point.load())
    return groups


def _subcommands(groups: list[Any], name: str) -> list[Any]:
    """The commands `name` of `groups`, but for those that the project's code has put there."""
    from kedro.framework.project import PACKAGE_NAME

    found = []
    for group in groups:
        with suppress(Exception):  # no group, no such command, or one that can't be loaded
            context = group.context_class(group)
            command: Any = group.get_command(context, name) if name in group.list_commands(context) else None
            outer, inner = (str(getattr(x.callback, "__module__", None)).partition(".")[0] for x in (group, command))
            if inner == "kedro" if outer == "kedro" else inner != PACKAGE_NAME:
                found.append(command)
    return found


# The post -----------------------------------------------------------------------------------------------------------
def _post(event: Properties) -> bool:
    """Post `event` to Heap and tell whether it was accepted, when the deadline has passed at the latest."""
    outcome: list[int | str] = []
    # A name look-up has no time-out of its own, and a daemon thread keeps no process from ending.
    thread = threading.Thread(target=lambda: outcome.append(_deliver(event)), name="kedro-telemetry", daemon=True)
    thread.start()
    thread.join(DEADLINE)
    if not outcome:
        telemetry_hook.back_off_start = time.time()
        with suppress(OSError):  # and no lock: the deadline has passed, and one stamp is as good as another
            _write(_user_file("telemetry.backoff"), f"{telemetry_hook.back_off_start}\n".encode())
    if outcome != [200]:
        logger.debug("An event was lost: %s", *(outcome or ["TimeoutError"]))
    return outcome == [200]


def _deliver(event: Properties) -> int | str:
    """Post `event` to Heap, for as long as it takes; gives the status of the answer, or the name of what went wrong."""
    try:
        import urllib.request

        opener = urllib.request.OpenerDirector()  # proxies and HTTPS are all that it knows: no redirect
        opener.add_handler(urllib.request.ProxyHandler())
        opener.add_handler(urllib.request.HTTPSHandler(context=_tls_context()))
        headers = {"Content-Type": "application/json", "User-Agent": f"kedro-telemetry/{__version__}"}
        request = urllib.request.Request(ENDPOINT, json.dumps(event).encode(), headers)
        with opener.open(request, timeout=2 * DEADLINE) as response:
            return int(response.status)
    except Exception as error:
        return type(error).__name__


def _tls_context() -> Any:
    """An SSLContext: SSL_CERT_FILE, or a directory of hashed certificates, else the platform's store, else certifi."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    folder = None if (chosen := os.environ.get("SSL_CERT_FILE")) else ssl.get_default_verify_paths().capath
    if folder and any(re.fullmatch(r"[0-9a-f]{8}\.\d+", name) for name in os.listdir(folder)):
        context.load_verify_locations(capath=folder)  # each is read when it is needed, which costs nothing
    else:
        context.load_default_certs()
        with suppress(ImportError):
            if not chosen and not context.cert_store_stats()["x509_ca"]:
                context.load_verify_locations(__import__("certifi").where())
    return context


def _back_off_end() -> float:
    """When a post may be tried again, in seconds since the epoch; 0.0 for at once."""
    now, start = time.time(), telemetry_hook.back_off_start
    with suppress(OSError, ValueError):
        path = _user_file("telemetry.backoff")
        stamp = float(_read(path))
        if all(0 <= now - then < BACK_OFF for then in (stamp, path.stat().st_mtime)):
            start = stamp
    return start + BACK_OFF if 0 <= now - start < BACK_OFF else 0.0


# Files --------------------------------------------------------------------------------------------------------------
def _read(path: Path) -> bytes:
    """The content of the file at `path`, b"" where there is no file, OSError for what can't be read in no time."""
    if not os.path.lexists(path):
        return b""
    if os.stat(path).st_size > LARGEST_FILE or not path.is_file():
        raise OSError(f"{path} is too large or no file")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    """Make `content` that of the file at `path`, whole or not at all; mode, owner and links stay. OSError if not."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    old = os.stat(path) if path.exists() else None
    if old and (old.st_nlink > 1 or not old.st_mode & 0o222 or not os.access(path, os.W_OK)):
        raise PermissionError(f"{path} is read-only, or has another name")
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    with ExitStack() as stack, open(temporary, "xb") as file:
        stack.callback(temporary.unlink, missing_ok=True)
        if old:
            os.chmod(temporary, old.st_mode & 0o7777)
            getattr(os, "chown", lambda *_: None)(temporary, old.st_uid, old.st_gid)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        file.close()  # or Windows would not replace
        os.replace(temporary, path)


def _locked(folder: Path) -> ExitStack:
    """Keep other processes from writing in `folder`, made if need be; without locks (Windows) the last writer wins."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = ExitStack()
    with suppress(ImportError, OSError):
        import fcntl

        lock.callback(os.close, handle := os.open(folder, os.O_RDONLY))
        for _ in range(int(LOCK_PATIENCE / 0.005)):
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.005)
    return lock


def _toml(content: bytes, *names: str) -> Properties | None:
    """The table `names` of the TOML document `content`, empty where there is none; None where it is not TOML."""
    import tomllib

    try:
        data: Any = tomllib.loads(content.decode())
    except (ValueError, RecursionError):
        return None
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _set_in_file(path: Path, names: tuple[str, ...], key: str, value: str | bool) -> None:
    """Set `key` in the table `names` of the TOML file at `path`, and no other byte; OSError if it can't be.

    Of the edits that may be it, the first that makes the wanted document is. The user's file starts anew if not TOML.
    """
    content, literal = _read(path), json.dumps(value)
    if (wanted := _toml(content)) is None and names == ("telemetry",):
        content, wanted = b"", {}
    table: Any = wanted
    for name in names:
        table = table.setdefault(name, {})
    if not isinstance(table, dict):
        raise OSError(f"{path} has no table for {key}")
    table[key], text = value, content.decode()
    newline, line, equals = "\r\n" if "\r\n" in text else "\n", f"{key} = {literal}", r"[\"']?[ \t]*=[ \t]*"
    edits = [(x, literal) for x in re.finditer(rf"\b{key}{equals}({TOML_VALUE})", text)]
    headers = re.finditer(rf"(?m)^[ \t]*\[.*{names[-1]}.*(?:\n|\Z)()", text)
    edits += [(x, newline * (x[0][-1] != "\n") + line + newline) for x in headers]
    edits += [(x, put) for x in re.finditer(rf"\b{names[-1]}{equals}\{{[ \t]*()", text) for put in (f"{line}, ", line)]
    gap = newline * (2 - text.endswith("\n")) if text else ""
    edits[50:] = [(x, f"{gap}[{'.'.join(names)}]{newline}{line}{newline}") for x in re.finditer(r"()\Z", text)]
    for place, put in edits:
        edited = f"{text[: place.start(1)]}{put}{text[place.end(1) :]}".encode()
        with suppress(ValueError, RecursionError):  # compared as JSON, order is nothing and nan is nan
            if len({json.dumps(x, sort_keys=True, default=repr) for x in (wanted, _toml(edited))}) == 1:
                return _write(path, edited)
    raise OSError(f"{path} has no place for {key}")


# The command line ---------------------------------------------------------------------------------------------------
def main(arguments: list[str]) -> int:
    """Run the command that `arguments` are; gives the exit status, 1 where nothing could be written, 2 for nonsense."""
    try:
        if arguments == ["--help"]:
            print(HELP)
        elif arguments in ([], ["status"]):
            _print_status()
        elif arguments not in (["enable"], ["disable"]):
            print(HELP.splitlines()[0], file=sys.stderr)
            return 2
        else:
            path, consent = _user_file("telemetry.toml"), arguments == ["enable"]
            with _locked(path.parent):
                _set_in_file(path, ("telemetry",), "consent", consent)
            print(f"You said {'yes' if consent else 'no'} to telemetry, in every project of yours: {path}")
            answer, source, _ = _find_consent(_find_project())
            if consent and not answer:
                print(f"A no is still a no, and here telemetry is off because of {source}")
    except (OSError, ValueError, RecursionError) as error:
        print(f"Nothing has changed: {error}", file=sys.stderr)
        return 1
    return 0


def _print_status() -> None:
    """Print where the user stands. Writes and sends nothing, and runs no code of the project."""
    project, held_back = _find_project(), _back_off_end()
    answer, source = _find_consent(project)[:2]
    until = time.strftime("nothing is sent until %Y-%m-%d %H:%M:%S", time.localtime(held_back))
    event = "CLI command", {"command": f"kedro {MASK}", "main_command": MASK}
    print(f"Telemetry:  {'off' if answer is False else 'on'} here: {source}")
    print(f"Identity:   {_get_or_create_uuid(create=False) or NOT_YET} in {_user_file('telemetry.toml')}")
    print(f"Project:    {project or 'none here'}")
    if project:
        event = "Kedro Project Statistics", {"command": "kedro run", "main_command": "run"}
        found = _keep_id(project / "pyproject.toml", ("tool", "kedro_telemetry"), "project_id", create=False)
        print(f"Project id: {NOT_YET if found is None else found} in {project / 'pyproject.toml'}")
        print("Not looked at, as only the project's code can tell: DISABLE_HOOKS_FOR_PLUGINS, the statistics")
    print(f"Endpoint:   {ENDPOINT}\nBack-off:   {until if held_back else 'none'}\n")
    print(f"A `kedro run` here {'sends nothing; with telemetry on it ' * (answer is False)}would send:")
    print(json.dumps(_make_event(*event, project, create=False), indent=2))


def _find_project() -> Path | None:
    """The root of the Kedro project around the current directory, as Kedro finds it."""
    with suppress(OSError, StopIteration):
        return next(x for x in Path("here").absolute().parents if b"[tool.kedro]" in _read(x / "pyproject.toml"))
    return None


# The logger is one in a process: a copy vendored into a project shares its hook with an installed one.
telemetry_hook: KedroTelemetryHook = vars(logger).setdefault("hook", KedroTelemetryHook())
plugin = api = sys.modules[f"{__name__}.plugin"] = sys.modules[f"{__name__}.api"] = sys.modules[__name__]
if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
