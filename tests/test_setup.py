"""setup.sh: which virtual environment is used, which is made anew, and what is left alone. pip is a
stand-in that says what it is asked for."""
import fcntl
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
PIP = """import os, sys
if sys.argv[1:] != ["--version"]:
    print("pip", *sys.argv[1:], "into", sys.prefix, flush=True)
    sys.exit(int(os.environ.get("PIP_FAILS", 0)))
"""
# The Python that makes .venv: a real one, but its environments get the stand-in for pip, and it
# fails at code that holds $REFUSED.
BASE = """#!/bin/bash
if [ "$1 $2" = "-m venv" ]; then
  {python} -m venv --without-pip "$3"
  packages=$(echo "$3"/lib/python*/site-packages)
  mkdir "$packages/pip"; cp stand-in.py "$packages/pip/__main__.py"
elif [[ "$2" == *"$REFUSED"* ]] && [ -n "$REFUSED" ]; then exit 1
else exec {python} "$@"; fi
"""


@pytest.fixture
def folder(tmp_path):
    """train.sh and setup.sh in a folder of their own, with a girl.py that says where it runs."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("train.sh", "setup.sh"):
        shutil.copy(HERE / name, folder)
    (folder / "girl.py").write_text("import sys; print('girl', *sys.argv[1:], 'in', sys.prefix)")
    (folder / "requirements.txt").write_text('thing==1.0; python_version < "3"\n'
                                             'thing==1.5; python_version >= "3"\n')
    (folder / "stand-in.py").write_text(PIP)
    (folder / "base").write_text(BASE.format(python=sys.executable))
    (folder / "base").chmod(0o755)
    return folder


def start(folder, **environment):
    outside = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    return subprocess.Popen(["bash", str(folder / "train.sh"), "--seed", "1"], cwd="/", text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=outside | {"PYTHON": str(folder / "base")} | environment)


def train(folder, **environment):
    """Exit code, standard output and standard error of `bash train.sh`, as from another folder."""
    process = start(folder, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def all_is_well(environment):
    return "pip install --no-user --quiet --disable-pip-version-check -r requirements.txt " \
           f"into {environment}\ngirl train --seed 1 in {environment}\n"


def refused(folder, says, **environment):
    """Exit code 2 and one line that says so; girl.py is not reached."""
    code, out, err = train(folder, **environment)
    assert code == 2 and says in err and err.count("\n") == 1, (code, out, err)
    assert "girl" not in out


def venv(path, *more):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", *more, path], check=True)
    return next(path.glob("lib/python*/site-packages"))


def add_pip(packages, content=PIP):
    (packages / "pip").mkdir()
    (packages / "pip" / "__main__.py").write_text(content)


def add_thing(packages, version):
    (packages / "thing.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: Thing\nVersion: {version}\n"
    (packages / "thing.dist-info" / "METADATA").write_text(metadata)


def test_an_environment_is_made_once_and_used_again(folder):
    assert train(folder) == (0, all_is_well(folder / ".venv"), "")
    (folder / ".venv" / "mine").write_text("")
    assert train(folder, REFUSED="version_info") == (0, all_is_well(folder / ".venv"), "")
    assert (folder / ".venv" / "mine").exists()


def only_folders(path):
    (path / "bin").mkdir(parents=True)
    (path / "lib" / "python3" / "site-packages").mkdir(parents=True)
    (path / "lib64").symlink_to("lib")
    (path / ".gitignore").write_text("*")           # newer Pythons write it before pyvenv.cfg


def no_activate(path):
    (venv(path) / "mine").write_text("")
    (path / "bin" / "activate").unlink()


def pip_cut_short(path):
    add_pip(venv(path), "import pip._internal")
    (path / "bin" / "activate").unlink()


def activate_cut_short(path):
    add_pip(venv(path))
    (path / "bin" / "activate").write_text("")


def no_python_any_more(path):
    add_pip(venv(path))
    for name in path.glob("bin/python*"):
        name.unlink()
    (path / "bin" / "python").symlink_to("/no/such/python")


def deletion_cut_short(path):
    path.mkdir()
    (path / "pyvenv.cfg").write_text("home = /usr/bin\n")


@pytest.mark.parametrize("half_made", [
    Path.mkdir, only_folders, no_activate, pip_cut_short, activate_cut_short, no_python_any_more,
    deletion_cut_short])
def test_a_half_made_environment_is_made_anew(folder, half_made):
    half_made(folder / ".venv")
    code, out, err = train(folder)
    assert (code, out) == (0, all_is_well(folder / ".venv"))
    assert err.endswith("train.sh: .venv is incomplete, or its Python is gone; making it anew\n")
    assert err.count("\n") == 1
    assert not list((folder / ".venv").rglob("mine"))


def test_a_half_made_environment_stays_where_none_can_be_made(folder):
    no_activate(folder / ".venv")
    refused(folder, "apt install python3.", REFUSED="ensurepip")
    refused(folder, "base is no Python 3.10 or newer; name one that is:  PYTHON=python3.12 bash",
            REFUSED="version_info")
    refused(folder, "no-such-python is no Python 3.10", PYTHON="no-such-python")
    assert list((folder / ".venv").rglob("mine"))


def a_file(path):
    path.write_text("mine")


def a_link_to_nothing(path):
    path.symlink_to("/no/such/environment")


def a_link_to_an_environment_that_does_not_run(path):
    no_activate(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def anything_else(path):
    path.mkdir()
    (path / "mine").write_text("")


@pytest.mark.parametrize("put", [
    a_file, a_link_to_nothing, a_link_to_an_environment_that_does_not_run, anything_else])
def test_what_was_not_made_here_is_not_deleted(folder, put):
    put(folder / ".venv")
    before = sorted(folder.rglob("*"))
    refused(folder, "a folder/.venv: does not work, and was not made here; move it away, or")
    assert sorted(folder.rglob("*")) == before


def test_a_link_to_an_environment_that_works_is_used(folder):
    add_pip(venv(folder / "elsewhere"))
    (folder / ".venv").symlink_to("elsewhere")
    code, out, err = train(folder)
    assert (code, err) == (0, "") and (folder / ".venv").is_symlink() and "girl train" in out


def test_the_active_environment_is_used_also_where_path_does_not_begin_with_it(folder):
    add_pip(venv(folder / "active"))
    active = folder / "active"
    assert train(folder, VIRTUAL_ENV=str(active)) == (0, all_is_well(active), "")
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("there", [False, True])
def test_an_active_environment_without_a_python_that_runs_is_refused(folder, there):
    """Deleted, or its Python is gone: nothing must be installed for another python on the PATH."""
    if there:
        no_python_any_more(folder / "active")
    refused(folder, f"the active environment {folder / 'active'} has no Python 3.10 or newer; run  "
            "deactivate  first", VIRTUAL_ENV=str(folder / "active"))
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("version, met", [
    ("1.5", True), ("1.5+cpu", True), ("1.50", False), ("1.4", False), (None, False)])
def test_an_environment_without_pip_is_used_if_it_has_what_is_pinned(folder, version, met):
    packages = venv(folder / "active")
    if version:
        add_thing(packages, version)
    if met:
        code, out, err = train(folder, VIRTUAL_ENV=str(folder / "active"))
        assert (code, out, err) == (0, f"girl train --seed 1 in {folder / 'active'}\n", "")
    else:
        refused(folder, f"active has no pip that works; run  {folder / 'active'}/bin/python -m "
                f"ensurepip  or  uv pip install -r {folder}/requirements.txt",
                VIRTUAL_ENV=str(folder / "active"))


def test_a_venv_that_someone_made_without_pip_gets_pip_and_keeps_what_it_has(folder):
    """As `uv venv` makes it. ensurepip is a stand-in too."""
    packages = venv(folder / ".venv")
    given, place = str(folder / "given"), str(packages / "pip")
    (packages / "ensurepip.py").write_text(f"import shutil; shutil.copytree({given!r}, {place!r})")
    # (Not sitecustomize.py: Debian's Python has its own.)
    (packages / "first.pth").write_text(f"import sys; sys.path.insert(0, {str(packages)!r})\n")
    (folder / "given").mkdir()
    (folder / "given" / "__main__.py").write_text(PIP)
    assert train(folder) == (0, all_is_well(folder / ".venv"), "")
    assert (packages / "ensurepip.py").exists()


def test_what_pip_cannot_install_ends_it(folder):
    code, out, err = train(folder, PIP_FAILS="1")
    assert code == 2 and "girl" not in out
    assert err.endswith("train.sh: pip could not install all of requirements.txt, see above\n")
    assert train(folder)[0] == 0


def test_a_venv_of_an_old_python_is_named(folder):
    venv(folder / ".venv")
    python = folder / ".venv" / "bin" / "python"
    python.unlink()
    python.write_text('#!/bin/bash\n[[ "$2" != *version_info* ]]\n')
    python.chmod(0o755)
    refused(folder, "a folder/.venv: its Python is older than 3.10; delete .venv, and run this")


def test_one_at_a_time_makes_the_environment(folder):
    """A second run neither deletes nor uses what the first one is still making."""
    no_activate(folder / ".venv")
    with open(folder / "setup.sh") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = start(folder)
        says = process.stdout.readline()
        assert says == "waiting for another train.sh or test.sh, which is installing\n"
        assert not select.select([process.stdout, process.stderr], [], [], 1)[0]    # it does wait
        (folder / ".venv" / "bin" / "activate").write_text("# whole now")
        add_pip(next(folder.glob(".venv/lib/python*/site-packages")))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, all_is_well(folder / ".venv"), "")
    assert list((folder / ".venv").rglob("mine"))


def test_the_lock_is_not_held_by_the_training(folder):
    (folder / "girl.py").write_text("import fcntl; f = open('setup.sh'); "
                                    "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')")
    code, out, err = train(folder)
    assert code == 0 and out.endswith("free\n"), err


def test_a_checkout_has_unix_line_ends_whatever_git_is_told(tmp_path):
    def git(*command):
        settings = ("core.autocrlf=true", "core.safecrlf=false", "user.name=a", "user.email=a")
        subprocess.run(["git", *(part for s in settings for part in ("-c", s)), *command],
                       check=True, capture_output=True, cwd=tmp_path / "one")
    (tmp_path / "one").mkdir()
    names = [path.name for path in HERE.iterdir() if path.is_file() and path.name != ".git"]
    for name in names:
        shutil.copy(HERE / name, tmp_path / "one")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    git("clone", "-q", ".", "../two")
    assert {"train.sh", "setup.sh", "test.sh", "requirements.txt", "girl.py"} <= set(names)
    assert [name for name in names if b"\r" in (tmp_path / "two" / name).read_bytes()] == []
