"""What `launch.benchmark` measures: each suite yields titles and their named cases."""
