# What a profile's tables and figures need, and how to make it. `make reproduce` calls this file;
#   snakemake --cores 2 --config profile=quick data=phantoms
# runs it by hand, and an executor plugin (--executor slurm ...) sends the jobs to a cluster. A job is several runs
# that one Jupyter kernel does; with job_per_run=true there are as many jobs as runs.
import sys
sys.path.insert(0, workflow.basedir)  # the library of this checkout

from mlds.study.plan import make_plan, plan_folder, write_plan

RUNS = str(config.get("runs", "runs"))
CORES = 0 if config.get("job_per_run") else workflow.cores or 1
PROFILE, DATA = str(config.get("profile", "quick")), str(config.get("data", "phantoms"))
PLAN = make_plan("settings.ini", PROFILE, DATA, RUNS, CORES, config.get("committed"))
FILE, FOLDER = write_plan(PLAN), plan_folder(PLAN)  # what the jobs read, and where their logs are
RESULTS = f"{RUNS}/results/{PLAN['name']}/runs.csv"
DRAWINGS = [names for names in (PLAN["results"][k::CORES or 1] for k in range(CORES or 1)) if names]
SHOW = "2> {log:q} || (grep -v IPKernelApp {log:q} | tail -n 3 >&2; exit 1)"  # the error, when there is one


def records(names):
    return [f"{RUNS}/{name}/run.json" for name in names]


def drawn(names):
    return [f"{RUNS}/figures/{PLAN['name']}/{name}.md" for name in names]


localrules:
    all,
    export,


rule all:
    input:
        records(PLAN["runs"]),
        drawn(PLAN["results"]),


# A run is finished when its run.json is there. Snakemake deletes the declared outputs of a job that fails or is about
# to begin; run.json is a second name of a file that it does not know, and is put back by the next job. Of the jobs
# that can begin, the first of the plan has the highest priority.
for k, (job, names) in enumerate(PLAN["jobs"].items()):

    rule:
        name:
            f"run_{job.replace('-', '_')}"
        input:
            ancient(records(sorted({n for name in names for n in PLAN["runs"][name]["needs"]} - set(names)))),
            ancient([f"{FOLDER}/phantoms"] if PLAN["data"] == "phantoms" else []),
        output:
            records(names),
        log:
            f"{FOLDER}/{job}.log",
        params:
            file=FILE,
            job=job,
        threads: 1
        priority: len(PLAN["jobs"]) - k
        shell:
            "OMP_NUM_THREADS={threads} mlds-plan run {params.file:q} {params.job} " + SHOW


rule phantoms:
    output:
        touch(f"{FOLDER}/phantoms"),
    params:
        file=FILE,
    shell:
        "mlds-plan phantoms {params.file:q}"


rule export:
    input:
        records(PLAN["runs"]),
        f"{FOLDER}/tables.json",  # what the tables are and claim; newer where settings.ini says something else
    output:
        RESULTS,
    params:
        file=FILE,
    shell:
        "mlds-plan export {params.file:q}"


for k, names in enumerate(DRAWINGS):

    rule:
        name:
            f"draw_{k}"
        input:
            RESULTS,
            [f"nbs/experiments/{name}.ipynb" for name in names],
        output:
            drawn(names),
        log:
            f"{FOLDER}/draw_{k}.log",
        params:
            file=FILE,
            names=names,
        shell:
            "OMP_NUM_THREADS={threads} mlds-plan draw {params.file:q} {params.names} " + SHOW
