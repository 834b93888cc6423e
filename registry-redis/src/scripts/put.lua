-- ARGV: 4 owner, 5 ttl, 6 how long the records live (0 for ever), 7 'claim' or 'restore', 8 the records as a message says
-- that they were put, then for each the digest of what it may replace. Answers for each record: '' if it is there now, else
-- {digest, value} of what is there instead, and nothing at all if all are there; then the head, and 1 if this began a new
-- history.
if redis.call('EXISTS', G) == 1 then return {'gone'} end
local owner, ttl, life, restoring = ARGV[4], ARGV[5], ARGV[6], ARGV[7] == 'restore'
local said, at, ids, news, n = ARGV[8], 1, {}, {}, 0
while at <= #said do
  local field, value, from = string.match(said, '^put (%d+) (%d+) ()', at)
  local between = from + field
  at = between + value
  n = n + 1
  ids[n], news[n] = string.sub(said, from, between - 1), string.sub(said, between, at - 1)
end
local _, fresh, olds = open(ttl, ids)
local due = looked() or fresh
if due then heal() end
if tonumber(ttl) > long then
  long, due = tonumber(ttl), true
  redis.call('HSET', R, '~ttl', ttl)
end
local out, taken, values, puts, expiry, lives = {}, 0, {}, 0, {}, 0
local ends = ms(now + life)
for k = 1, n do
  local id, old, expected, v = ids[k], olds[k + 5], ARGV[8 + k], news[k]
  local free = not old
  if old then
    if expected ~= '' then free = redis.sha1hex(old) == expected
    elseif restoring then
      local o, e = split(old)
      local _, ours = split(v)
      free = o == owner and e <= ours
    end
    free = free or (restoring and is_dead(id))
  end
  if free then
    if old ~= v then
      values[puts + 1], values[puts + 2] = id, v
      puts = puts + 2
    end
    if life == '0' then redis.call('ZREM', X, id)
    else
      expiry[lives + 1], expiry[lives + 2] = ends, id
      lives = lives + 2
    end
    out[k] = ''
  else
    taken = taken + 1
    out[k] = {redis.sha1hex(old), old}
  end
end
-- All of them, as nearly always.
local whole = puts == 2 * n and (n == 1 or #said <= LONGEST_SAID) and said
for i = 1, puts, 2 do changed('put', values[i], values[i + 1], whole) end
done(values, whole)
if lives > 0 then redis.call('ZADD', X, unpack(expiry)) end
-- Else whoever looked has seen to that, just before.
if due or life == '0' then keep() end
if taken == 0 then out, n = {}, 0 end
out[n + 1], out[n + 2] = head, fresh and 1 or 0
return out
