"The profile of cluster/slurm on a SLURM of one node, which the test starts; skipped where SLURM is not installed."
import os, shutil, socket, subprocess, sys, time
from pathlib import Path

import pytest

from conftest import ROOT
from mlds.study.plan import make_plan

PROGRAMS = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue'
ABSENT = [p for p in PROGRAMS if not shutil.which(p)]
CONF = Path('/etc/slurm/slurm.conf') # where srun looks for it within a job
SETTINGS = '''ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MailProg=/bin/true
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=5000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
'''

pytestmark = [
    pytest.mark.skipif(bool(ABSENT), reason=f"SLURM is not installed ({', '.join(ABSENT)} missing): apt install munge slurm-wlm"),
    pytest.mark.skipif(os.name != 'posix' or os.getuid() != 0, reason="starting a SLURM of one's own needs root"),
    pytest.mark.skipif(CONF.exists(), reason=f"this machine has a SLURM already, in {CONF}")]

def free_ports(n):
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports

def sockets_of_munge(folder):
    return ['--force', f'--key-file={folder}/key', f'--socket={folder}/munge.socket', f'--log-file={folder}/munge.log',
            f'--pid-file={folder}/munge.pid', f'--seed-file={folder}/munge.seed', '--num-threads=1']

@pytest.fixture
def slurm(tmp_path):
    pytest.importorskip('snakemake_executor_plugin_slurm', reason="pip install snakemake-executor-plugin-slurm")
    folder = tmp_path/'slurm'
    for name in ('', 'state', 'spool'): (folder/name).mkdir(mode=0o755)
    (folder/'key').write_bytes(os.urandom(1024))
    (folder/'key').chmod(0o600)
    (folder/'slurm.conf').write_text(SETTINGS.format(folder=folder, ports=free_ports(2)))
    CONF.symlink_to(folder/'slurm.conf')
    commands = [['munged', '-F', *sockets_of_munge(folder)], ['slurmctld', '-D'], ['slurmd', '-D', '-N', 'localhost']]
    started = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(2)
        yield folder
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        CONF.unlink()

def test_a_run_goes_through_slurm(slurm, tmp_path):
    runs = tmp_path/'runs'
    plan = make_plan(ROOT/'settings.ini', 'smoke', runs=runs, cores=0)
    job = next(name for name in plan['jobs'] if name.startswith('train'))
    run, = plan['jobs'][job]
    done = subprocess.run(['snakemake', '--profile', ROOT/'cluster/slurm', '--slurm-init-seconds-before-status-checks', '5',
                           '--seconds-between-status-checks', '5', '--config', 'profile=smoke', 'job_per_run=true',
                           f'runs={runs}', '--until', f"run_{job.replace('-', '_')}"], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:] + (slurm/'slurmd.log').read_text()[-1000:]
    assert (runs/run/'run.json').exists()
    said = (slurm/'slurmctld.log').read_text()
    assert said.count('WEXITSTATUS 0') >= 2, 'phantoms and the run are jobs of SLURM'
