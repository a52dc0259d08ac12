"""The job file for GKE and the page of documentation agree with the scripts."""

import re
import shutil
import subprocess

import pytest
import yaml
from slice_stand_in import SCRIPTS

README = (SCRIPTS / "README.md").read_text()


def fill_in_job(**fields):
    text = (SCRIPTS / "gke_job.yaml").read_text()
    head = "\n".join(line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   export "))
    changes = "\n".join(f"export {name}='{value}'" for name, value in fields.items())
    script = f"{head}\n{changes}\nenvsubst < {SCRIPTS}/gke_job.yaml"
    return subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("envsubst") is None, reason="envsubst (gettext) is not installed")
def test_job_file_is_complete_with_fields_of_its_head():
    filled = fill_in_job(WORKERS=4, SLICES=2, CHIPS_PER_WORKER=4, RESTARTS=7)
    assert "${" not in filled
    job = yaml.safe_load(filled)
    assert job["kind"] == "JobSet"
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 7
    (slices,) = job["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    assert slices["template"]["spec"]["parallelism"] == slices["template"]["spec"]["completions"] == 4
    pod = slices["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4


@pytest.mark.skipif(shutil.which("envsubst") is None, reason="envsubst (gettext) is not installed")
def test_job_file_hands_command_with_quotes_on_unchanged():
    command = 'python -m isheep_jax.generate --prompt "one: two, {three}"'
    job = yaml.safe_load(fill_in_job(COMMAND=command))
    container = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == [f"exec {command}\n"]


def test_page_names_every_script():
    for script in SCRIPTS.glob("*.sh"):
        assert f"`{script.name}`" in README


def test_page_uses_options_that_scripts_have(pod):
    block = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
    commands = re.findall(r"^tpu_scripts/(\w+\.sh) +(pod[^#\n]*)", block, flags=re.MULTILINE)
    assert {script for script, _ in commands} >= {"create.sh", "install.sh", "run.sh", "watch.sh", "supervise.sh"}
    for script, arguments in commands:
        pod.dry_run(script, *arguments.split(), HF_TOKEN="token")


def test_table_of_chips_agrees_with_scripts(pod):
    rows = re.findall(r"\| `(v\w+-\d+)`, `(v\w+-\d+)` \| (\d+) \| ([\d,]+) (?=\|)", README)
    assert len(rows) == 14
    for *names, chips, hours in rows:
        assert int(hours.replace(",", "")) == 24 * int(chips)
        for name in names:
            shown = pod.run("create.sh", "pod", "--dry-run", f"--type={name}").stdout
            assert f" has {chips} chips\n" in shown
