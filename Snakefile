# What a profile's tables and figures need, and how to make it. `make reproduce` calls this file;
#   snakemake --cores 2 --config profile=quick data=phantoms
# runs it by hand, and an executor plugin (--executor slurm ...) sends the trainings to a cluster.
import sys
sys.path.insert(0, workflow.basedir)  # the library of this checkout

from mlds.plan import make_plan, write_plan

PROFILE, DATA = config.get("profile", "quick"), str(config.get("data", "phantoms"))
RUNS, FIGURES = config.get("runs", "runs"), config.get("figures", "figures")
PLAN = make_plan("settings.ini", PROFILE, DATA, RUNS)
FILES = f"{RUNS}/plans/{PLAN['name']}"  # parameters of each run, executed notebooks
PAPERMILL = "papermill --no-progress-bar --log-level ERROR -k python3 --execution-timeout 86400"
SHOW = "|| (grep -v IPKernelApp {log} | tail -n 20 >&2; exit 1)"  # the error, when there is one
write_plan(PLAN, FILES)


def metrics_of(runs):
    return sorted({f"{RUNS}/{run}/metrics.json" for run in runs})


wildcard_constraints:
    run="[0-9a-f]{12}",


localrules:
    all,


rule all:
    input:
        expand(f"{FILES}/{{result}}.drawn", result=PLAN["results"]),


# The library makes the run's folder complete or not at all, so the metrics file stands for the folder.
# A run waits for those that it builds on: a fine-tuning for its pre-training.
rule train:
    input:
        lambda w: metrics_of(PLAN["needs"][w.run]),
        data=[] if DATA != "phantoms" else ancient(f"{FILES}/phantoms.done"),
    output:
        f"{RUNS}/{{run}}/metrics.json",
    log:
        f"{FILES}/{{run}}.log",
    params:
        notebook=lambda w: PLAN["notebook"][w.run],
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} " + PAPERMILL + f" nbs/experiments/{{params.notebook}}.ipynb {FILES}/{{wildcards.run}}.ipynb -f {FILES}/{{wildcards.run}}.json"
        + " > {log} 2>&1 " + SHOW + f" && python -c \"from mlds.plan import progress; print(progress('{FILES}', '{{wildcards.run}}'), flush=True)\""


rule phantoms:
    output:
        touch(f"{FILES}/phantoms.done"),
    shell:
        f"python -c \"from mlds.chest_experiments import draw_phantoms; draw_phantoms('{FILES}/plan.json')\""


# Tables and figures are committed, so that one that is there need not be of these runs: the touched file says so.
rule draw:
    input:
        lambda w: metrics_of(cell["run"] for cell in PLAN[w.result]),
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
