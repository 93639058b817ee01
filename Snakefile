# What a profile's tables and figures need, and how to make it. `make reproduce` calls this file;
#   snakemake --cores 2 --config profile=quick data=phantoms
# runs it by hand, and an executor plugin (--executor slurm ...) sends the trainings to a cluster, with
# apart=true among the settings as many at a time as there are runs.
import sys
sys.path.insert(0, workflow.basedir)  # the library of this checkout

from mlds.study.plan import make_plan, write_plan

PROFILE, DATA = config.get("profile", "quick"), str(config.get("data", "phantoms"))
RUNS, FIGURES = config.get("runs", "runs"), config.get("figures", "figures")
PLAN = make_plan("settings.ini", PROFILE, DATA, RUNS)
if config.get("apart"):  # a process for each run; otherwise one does all seeds, which saves their start
    PLAN["jobs"] = {run: [run] for run in PLAN["runs"]}
JOBS = {run: job for job, runs in PLAN["jobs"].items() for run in runs}
FILES = f"{RUNS}/plans/{PLAN['name']}"  # parameters of each job, executed notebooks
PAPERMILL = "papermill --no-progress-bar --log-level ERROR -k python3 --execution-timeout 86400"
SHOW = "|| (grep -v IPKernelApp {log} | tail -n 20 >&2; exit 1)"  # the error, when there is one
write_plan(PLAN, FILES)


def done(runs):
    return sorted({f"{FILES}/{JOBS[run]}.done" for run in runs})


wildcard_constraints:
    job="[0-9a-f]{12}",


localrules:
    all,


rule all:
    input:
        expand(f"{FILES}/{{result}}.drawn", result=PLAN["results"]),


# Folders of runs are the library's own: complete or not at all, and none of Snakemake's outputs, which it deletes when
# a job fails. A job waits for those that its runs build on: a fine-tuning for its pre-training.
rule train:
    input:
        lambda w: done(n for run in PLAN["jobs"][w.job] for n in PLAN["needs"][run]),
        data=[] if DATA != "phantoms" else ancient(f"{FILES}/phantoms.done"),
    output:
        touch(f"{FILES}/{{job}}.done"),
    log:
        f"{FILES}/{{job}}.log",
    params:
        notebook=lambda w: PLAN["notebook"][w.job],
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} " + PAPERMILL + f" nbs/experiments/{{params.notebook}}.ipynb {FILES}/{{wildcards.job}}.ipynb -f {FILES}/{{wildcards.job}}.json"
        + " > {log} 2>&1 " + SHOW + f" && python -c \"from mlds.study.plan import progress; print(progress('{FILES}', '{{wildcards.job}}'), flush=True)\""


rule phantoms:
    output:
        touch(f"{FILES}/phantoms.done"),
    shell:
        f"python -c \"from mlds.study.chest_experiments import draw_phantoms; draw_phantoms('{FILES}/plan.json')\""


# Tables and figures are committed, so that one that is there need not be of these runs: the touched file says so.
rule draw:
    input:
        lambda w: done(cell["run"] for cell in PLAN[w.result]),
        notebook="nbs/experiments/{result}.ipynb",
    output:
        f"{FIGURES}/{PLAN['name']}/{{result}}.md",
        f"{FIGURES}/{PLAN['name']}/{{result}}.png",
        touch(f"{FILES}/{{result}}.drawn"),
    log:
        f"{FILES}/{{result}}.log",
    shell:
        PAPERMILL + f" {{input.notebook}} {FILES}/{{wildcards.result}}.ipynb -p profile {PROFILE} -p data '{DATA}' -p runs {RUNS} -p figures {FIGURES}"
        + " > {log} 2>&1 " + SHOW
