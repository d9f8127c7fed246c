"""What is promised, and what it costs: plan, accounting, sensitivity, secrets. Imports neither jax nor, until
a figure is asked for, dp-accounting."""

from dpscale.privacy.accounting import delta as delta
from dpscale.privacy.accounting import epsilon as epsilon
from dpscale.privacy.accounting import epsilon_curve as epsilon_curve
from dpscale.privacy.accounting import noise_multiplier as noise_multiplier
from dpscale.privacy.plan import PrivacyPlan as PrivacyPlan
from dpscale.privacy.secret import RootSecret as RootSecret
