"""What a measurement ran on: the part of every result file that says whose numbers these are."""

from dpscale.scaling.environment import machine as machine
