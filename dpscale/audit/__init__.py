"""Auditing a run's promise from outside: an empirical lower bound on epsilon beside the claimed upper one."""

from dpscale.audit.run import AuditResult as AuditResult
from dpscale.audit.run import audit as audit
