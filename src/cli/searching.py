"""``sweep=optuna``: the next run's values are proposed from the results of the earlier ones."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from safelight.cli import composing
from safelight.cli.problems import ConfigError, Problem, did_you_mean
from safelight.cli.signatures import class_attribute
from safelight.cli.sweeping import Sweep, Sweeper, expand, job_problems, parse_one, run_job
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from optuna import Study, Trial


class OptunaSweep(Sweeper):
    """A search; the study file ``study.journal`` lies in the sweep's folder and carries on where it stopped.

    Values are written as for any sweep: ``key=a,b`` and ``key=choice(a,b)`` are alternatives, ``key=range(1,9,2)`` a
    grid, ``key=interval(0.1,1)`` a continuous range, ``key=int(interval(1,8))`` whole numbers and
    ``key=tag(log,interval(1e-4,1e-1))`` a range on a logarithmic scale.

    Args:
        metric: name in ``metrics`` of the runs' ``summary.json`` that is optimised.
        direction: whether small or large values are good.
        n_trials: runs in all, those of earlier calls included.
        sampler: tpe (tree of Parzen estimators) or random.
        seed: of the sampler.
        retry: make failed runs again.
    """

    searches = True

    def __init__(
        self,
        *,
        metric: str,
        direction: Literal["minimize", "maximize"] = "minimize",
        n_trials: Annotated[int, Ge(1)] = 20,
        sampler: Literal["tpe", "random"] = "tpe",
        seed: int = 0,
        retry: bool = False,
    ) -> None:
        super().__init__(retry=retry)
        self.metric, self.direction, self.n_trials, self.sampler, self.seed = metric, direction, n_trials, sampler, seed

    def plan(self, overrides: Sequence[str]) -> list[list[str]]:
        """Nothing is known from the start; what can be wrong with the search is checked here."""
        try:
            import optuna  # noqa: F401 - only to know that it is there
        except ImportError as error:
            raise SafelightError("sweep=optuna needs Optuna: pip install 'safelight[optuna]'") from error
        varied = [word for word in overrides if parse_one(word).is_sweep_override()]
        problems = []
        if not varied:
            problems.append(Problem("sweep", "nothing to search: give key=a,b or key=interval(0.1,1)"))
        # Any one point of the search space shows what is wrong with the rest of the command line.
        first = [_point(word, overrides) if word in varied else word for word in overrides]
        problems += job_problems(first)
        problems += _metric_problems(first, self.metric)
        if problems:
            raise ConfigError(problems)
        return []

    def run(self, sweep: Sweep) -> None:
        """Ask, run, tell; first what was begun and not ended."""
        import optuna

        study = self._study(sweep)
        trials = study.get_trials(deepcopy=False)
        sweep.jobs = [list(trial.user_attrs.get("job", [])) for trial in trials]
        for trial in trials:
            if trial.state == optuna.trial.TrialState.RUNNING and sweep.stopped_by is None:
                if not trial.user_attrs.get("job"):
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # Killed before it had its values.
                    continue
                self._make(sweep, study, trial.number, sweep.jobs[trial.number])
        if self.retry:
            again = {trial.user_attrs.get("retry_of") for trial in trials}
            for trial in trials:
                if trial.state == optuna.trial.TrialState.FAIL and trial.number not in again:
                    study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
            # What failed stays in the study; its second attempt is a run of its own and does not use up a trial.
            trials = study.get_trials(deepcopy=False)
            self.n_trials += sum("retry_of" in trial.user_attrs for trial in trials)
        while sweep.stopped_by is None and len(sweep.jobs) < self.n_trials:
            asked = study.ask()
            job = [_suggest(asked, word, sweep.overrides) for word in sweep.overrides]
            asked.set_user_attr("job", job)
            sweep.jobs.append(job)
            self._make(sweep, study, asked.number, job)
        if any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)):
            best = study.best_trial
            print(f"\nbest: {self.metric} {best.value} in {best.number:03d}")
            print(f"  python train.py {shlex.join(sweep.jobs[best.number])}")

    def _study(self, sweep: Sweep) -> Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(sweep.ledger.folder / "study.journal"))),
            study_name="safelight",
            direction=self.direction,
            load_if_exists=True,
        )
        # A search that goes on must not draw the same numbers again.
        seed = self.seed + len(study.get_trials(deepcopy=False))
        random = optuna.samplers.RandomSampler(seed=seed)
        study.sampler = optuna.samplers.TPESampler(seed=seed) if self.sampler == "tpe" else random
        return study

    def _make(self, sweep: Sweep, study: Study, number: int, job: Sequence[str]) -> None:
        import optuna

        from safelight.reporting import read_summary

        state = sweep.ledger.state(number)
        if state not in ("done", "failed"):
            state = run_job(sweep, number, job)
        if state == "stopped":
            return  # Stays a running trial; the next call goes on with it.
        metrics = read_summary(sweep.ledger.run_folder(number)).metrics if state == "done" else {}
        value = metrics.get(self.metric)
        if value is None:
            if state == "done":
                print(f"sweep: run {number:03d} has no metric {self.metric!r}; there are: {', '.join(metrics)}")
            study.tell(number, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(number, value)


def _metric_problems(job: Sequence[str], metric: str) -> list[Problem]:
    """A metric that the method does not declare."""
    config = composing.compose_all(job).config
    declared = class_attribute(str((config.get("method") or {}).get("_target_", "")), "metric_names") if config else ()
    if not declared or metric in declared:
        return []
    hint, guess = did_you_mean(metric, declared)
    fix = f"sweep.metric={guess}" if guess else ""
    return [Problem("sweep.metric", f"{metric!r} is not measured; {hint}", typed=f"sweep.metric={metric}", fix=fix)]


def _alternatives(typed: str, overrides: Sequence[str]) -> list[str]:
    """The overrides that a varied one stands for; plug-ins are needed to know what a glob() matches."""
    places = [word for word in overrides if word.startswith("hydra.searchpath=")]
    return [job[-1] for job in expand([*places, typed])]


def _point(typed: str, overrides: Sequence[str]) -> str:
    """One value of a varied override, to check the rest with."""
    from hydra.core.override_parser.types import IntervalSweep

    override = parse_one(typed)
    if isinstance(override.value(), IntervalSweep):
        return f"{override.get_key_element()}={override.value().start}"
    return _alternatives(typed, overrides)[0]


def _suggest(trial: Trial, typed: str, overrides: Sequence[str]) -> str:
    """An override with the value that the study proposes; unchanged when it is not varied."""
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep

    override = parse_one(typed)
    if not override.is_sweep_override():
        return typed
    key, values = override.get_key_element(), override.value()
    chosen: Any
    if isinstance(values, IntervalSweep):
        log = "log" in values.tags
        assert values.start is not None
        assert values.end is not None
        if isinstance(values.start, int) and isinstance(values.end, int):
            chosen = trial.suggest_int(key, values.start, values.end, log=log)
        else:
            chosen = trial.suggest_float(key, float(values.start), float(values.end), log=log)
    else:
        words = [word.partition("=")[2] for word in _alternatives(typed, overrides)]
        numbers = [int(word) for word in words] if isinstance(values, RangeSweep) and _whole(words) else []
        if len(numbers) > 1:
            chosen = trial.suggest_int(key, numbers[0], numbers[-1], step=numbers[1] - numbers[0])
        else:
            chosen = trial.suggest_categorical(key, words)
    return f"{key}={chosen}"


def _whole(words: Sequence[str]) -> bool:
    return all(word.lstrip("-").isdigit() for word in words)
