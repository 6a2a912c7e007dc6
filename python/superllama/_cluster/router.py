"""How Ray Serve finds the group of a session. Ray copies what is here, so what it shares is elsewhere."""

# Ray may be absent where types are checked, and everything of it is Any there
# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from . import sessions


class SessionRouter(RequestRouter):
    """Each session at its replica; where that is full, at the next one in its order. Who has no session goes where the
    fewest requests are. Groups that are whole come before those that miss a part."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Ranks of replicas, of which the first with room is taken."""
        session = getattr(next(iter(pending_request.args), None), "session", "") if pending_request is not None else ""
        whole = [one for one in candidate_replicas if facts_of(one).get("state", "ready") == "ready"]
        ranks = []
        for some in filter(None, (whole, [one for one in candidate_replicas if one not in whole])):
            if session:
                ranks += [
                    [one] for one in sessions.in_order(session, [(one.replica_id.unique_id, one) for one in some])
                ]
            else:
                ranks.append(some)
        return ranks

    def update_replicas(self, replicas: list[Any]) -> None:
        """Told of all that there are, and of what they do."""
        super().update_replicas(replicas)
        sessions.GROUPS[:] = [{"replica": one.replica_id.unique_id, **facts_of(one)} for one in replicas]


def facts_of(replica: Any) -> dict[str, Any]:
    """What a group said last of itself."""
    return dict(getattr(replica, "routing_stats", None) or {})
