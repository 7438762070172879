"""What people can mend of a cluster; each message is for them. Any other error is a defect."""


class ClusterError(Exception):
    """A cluster, or the way to it, is not as it has to be (exit code 2).

    The message says where, what was found, what is expected, and a way out.
    """

    exit_code = 2


class Refused(ClusterError):
    """The Jobs API was reached, and does not do what it was asked for."""


class Alive(ClusterError):
    """A job of the study is alive, and a study has one driver (exit code 75)."""

    exit_code = 75


class Unknown(ClusterError):
    """The cluster knows no job of the study."""


class NotStarted(ClusterError):
    """Ray could not be started on this machine, which may be too busy (exit code 71)."""

    exit_code = 71
