"""``sweep=slurm``: the runs of a sweep as one SLURM job array, submitted through submitit."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from safelight.cli import composing
from safelight.cli.problems import ConfigError, Problem
from safelight.cli.sweeping import Sweep, Sweeper, job_command
from safelight.errors import SafelightError


class RunJob:
    """One run, as submitit pickles it: its command. Requeued when the cluster takes the node back.

    Args:
        command: program and arguments.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"command": self.command, "_process": None}

    def __call__(self) -> int:
        """Run to the end.

        Raises:
            RuntimeError: the run failed; SLURM then shows the job as failed.
        """
        self._process = subprocess.Popen(self.command)
        code = self._process.wait()
        if code:
            raise RuntimeError(f"exit code {code}: {' '.join(self.command)}")
        return code

    def checkpoint(self) -> Any:
        """Called by submitit before the time is up; the run got the same signal: let it save, then requeue."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return DelayedSubmission(self)


class SlurmSweep(Sweeper):
    """One array job with a task group per run; each run asks for what its trainer says.

    Nodes, processes and GPUs follow from ``trainer.num_nodes``, ``trainer.devices`` and ``trainer.accelerator``. The
    call returns when everything is submitted; the same command shows how far the runs are and submits what is missing.

    Args:
        partition: of the cluster; None for its default.
        account: charged for it.
        qos: quality of service.
        constraint: features that the nodes must have.
        timeout_min: time limit of a run in minutes; a run that reaches it saves, is requeued and goes on.
        cpus_per_task: CPU cores per process.
        mem_gb: memory per node in GB.
        array_parallelism: runs at the same time.
        setup: shell lines before each run, such as module load.
        dry_run: write and print what would be submitted, submit nothing.
        retry: submit failed runs again.
    """

    def __init__(
        self,
        *,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        timeout_min: Annotated[int, Ge(1)] = 240,
        cpus_per_task: Annotated[int, Ge(1)] = 4,
        mem_gb: Annotated[float, Ge(1)] | None = None,
        array_parallelism: Annotated[int, Ge(1)] = 32,
        setup: list[str] | None = None,
        dry_run: bool = False,
        retry: bool = False,
    ) -> None:
        super().__init__(retry=retry)
        self.timeout_min, self.cpus_per_task, self.mem_gb = timeout_min, cpus_per_task, mem_gb
        self.array_parallelism, self.setup, self.dry_run = array_parallelism, setup, dry_run
        self.named = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}

    def plan(self, overrides: Sequence[str]) -> list[list[str]]:
        """All combinations, once it is known that they can be submitted."""
        try:
            import submitit  # noqa: F401 - only to know that it is there
        except ImportError as error:
            raise SafelightError("sweep=slurm needs submitit: pip install 'safelight[slurm]'") from error
        return super().plan(overrides)

    def run(self, sweep: Sweep) -> None:
        """Submit what is due and was not submitted before; see to what was."""
        import submitit

        logs = sweep.ledger.folder.absolute() / "slurm"
        if not self.dry_run:
            self._look_after(sweep, logs)
        due = [n for n in range(len(sweep.jobs)) if sweep.ledger.is_due(n, self.retry)]
        if not due:
            return
        wishes = [self.resources(sweep.jobs[number]) for number in due]
        if any(wish != wishes[0] for wish in wishes):
            text = "the runs need different devices, and an array has one kind: submit them as separate sweeps"
            raise ConfigError([Problem("trainer.devices", text)])
        commands = [job_command(sweep.jobs[n], sweep.ledger.run_folder(n).absolute()) for n in due]
        if self.dry_run:
            print(dry_run(logs, wishes[0], len(due)))
            print(
                "\n".join(f"{number:03d}: {shlex.join(command)}" for number, command in zip(due, commands, strict=True))
            )
            return
        try:
            executor = submitit.SlurmExecutor(logs)
        except RuntimeError as error:
            raise SafelightError(f"sweep=slurm: {error} sweep.dry_run=true shows what would be submitted") from error
        executor.update_parameters(**wishes[0])
        submitted = executor.submit_array([RunJob(command) for command in commands])
        for number, job in zip(due, submitted, strict=True):
            sweep.ledger.record(number, "submitted", sweep.jobs[number], job_id=job.job_id)
        print(f"submitted as job {submitted[0].job_id.partition('_')[0]}; its logs are in {logs}")

    def _look_after(self, sweep: Sweep, logs: Path) -> None:
        """Note which submitted runs are no longer in the queue and left no summary."""
        import submitit

        for name, line in sweep.ledger.last_lines().items():
            number = int(name)
            if line["state"] != "submitted" or sweep.ledger.state(number) == "done":
                continue
            state = submitit.SlurmJob(folder=logs, job_id=line["job_id"]).state
            if state.startswith(("CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL")):
                sweep.ledger.record(number, "stopped", line["overrides"], slurm=state)
            elif state in ("FAILED", "OUT_OF_MEMORY", "COMPLETED"):
                # Completed without a summary happens with test=false in fast_dev_run only.
                sweep.ledger.record(
                    number, "done" if state == "COMPLETED" else "failed", line["overrides"], slurm=state
                )

    def resources(self, job: Sequence[str]) -> dict[str, Any]:
        """The parameters of the array, as ``submitit.SlurmExecutor`` names them.

        Raises:
            ConfigError: ``trainer.devices`` is not a number, so nobody knows what to ask for.
        """
        trainer = composing.compose_all(job).config["trainer"]
        devices = trainer.get("devices", 1)
        devices = len(devices) if isinstance(devices, list) else devices
        if type(devices) is not int or devices < 1:
            text = f"is {devices}; a job has to ask for a number of them: trainer.devices=8"
            raise ConfigError([Problem("trainer.devices", text, fix="trainer.devices=1")])
        wish: dict[str, Any] = {
            "job_name": "safelight",
            "time": self.timeout_min,
            "nodes": int(trainer.get("num_nodes", 1)),
            # Lightning expects one process per device, started by SLURM.
            "ntasks_per_node": devices,
            "cpus_per_task": self.cpus_per_task,
            "array_parallelism": self.array_parallelism,
            **{name: value for name, value in self.named.items() if value is not None},
        }
        if trainer.get("accelerator") in ("gpu", "cuda", "auto"):
            wish["gpus_per_node"] = devices
        if self.mem_gb is not None:
            wish["mem"] = f"{self.mem_gb:g}GB"
        if self.setup:
            wish["setup"] = list(self.setup)
        return wish


def dry_run(logs: Path, resources: dict[str, Any], runs: int) -> str:
    """The batch file that submitit would hand to ``sbatch``, made by submitit from the same parameters.

    Args:
        logs: folder of submitit's files.
        resources: from ``SlurmSweep.resources``.
        runs: length of the array.
    """
    import submitit

    class Pretended(submitit.SlurmExecutor):
        """Thinks that it is on a cluster."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = Pretended(logs)
    executor.update_parameters(**resources)
    if runs > 1:
        executor.parameters["map_count"] = runs
    return executor._make_submission_file_text(executor._submitit_command_str, "dry_run")
