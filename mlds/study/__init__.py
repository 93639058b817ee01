"What only the compendium needs: runs, plan, statistics, tables."
