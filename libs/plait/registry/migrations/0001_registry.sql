-- The registry: one row per resource, an append-only log of every change, API keys, and one revision over all of it.

create table plait.revision (
    only_row boolean primary key default true check (only_row),
    value bigint not null
);
comment on table plait.revision is 'Bumped by every change; its row lock lets one writer in at a time.';

create table plait.resource (
    kind text not null,
    name text not null,
    spec jsonb not null,
    generation bigint not null check (generation > 0),
    revision bigint not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (kind, name)
);

create table plait.change (
    revision bigint not null,
    kind text not null,
    name text not null,
    generation bigint not null check (generation > 0),
    action text not null check (action in ('created', 'updated', 'deleted')),
    spec jsonb,
    actor text not null,
    reason text not null,
    changed_at timestamptz not null default now(),
    primary key (kind, name, generation),
    check ((spec is null) = (action = 'deleted'))
);
create index change_by_revision on plait.change (revision desc);
comment on table plait.change is 'History and audit in one: spec is what the resource became, null when it was deleted.';

create function plait.refuse_rewriting_history() returns trigger language plpgsql as $$
begin
    raise exception 'plait.change is append-only' using errcode = 'insufficient_privilege';
end
$$;
create trigger change_is_append_only before update or delete or truncate on plait.change
    for each statement execute function plait.refuse_rewriting_history();

create table plait.api_key (
    id text primary key,
    tenant text not null,
    sha256 text not null unique check (sha256 ~ '^[0-9a-f]{64}$'),
    scopes text[] not null,
    expires_at double precision not null default 0,
    created_at timestamptz not null default now(),
    revoked_at timestamptz
);
comment on column plait.api_key.sha256 is 'Of the 256-bit secret, which is stored nowhere.';

-- Whoever is not told apart belongs to the tenant "default".
insert into plait.revision (value) values (1);
insert into plait.resource (kind, name, spec, generation, revision) values ('Tenant', 'default', '{}', 1, 1);
insert into plait.change (revision, kind, name, generation, action, spec, actor, reason)
    values (1, 'Tenant', 'default', 1, 'created', '{}', 'plait migrate', 'every registry has this tenant');
