-- ARGV: 4 owner, 5 ttl, 6 how long the records live (0 for ever), 7 'claim' or 'restore', then for each record: id, digest
-- of what it may replace, value. Answers for each record: '' if it is there now, else {digest, value} of what is there
-- instead; then the head, and 1 if this began a new history.
if redis.call('EXISTS', G) == 1 then return {'gone'} end
local owner, ttl, life, restoring = ARGV[4], ARGV[5], ARGV[6], ARGV[7] == 'restore'
local _, fresh = open(ttl)
local due = looked() or fresh
if due then heal() end
if tonumber(ttl) > long then
  long, due = tonumber(ttl), true
  redis.call('HSET', R, '~ttl', ttl)
end
local ids, n = {}, 0
for i = 8, #ARGV, 3 do
  n = n + 1
  ids[n] = ARGV[i]
end
local olds = redis.call('HMGET', R, unpack(ids))
local out, values, puts, expiry, lives = {}, {}, 0, {}, 0
local ends = ms(now + life)
for k = 1, n do
  local id, old, expected, v = ids[k], olds[k], ARGV[3 * k + 6], ARGV[3 * k + 7]
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
      changed('put', id, v)
    end
    if life == '0' then redis.call('ZREM', X, id)
    else
      expiry[lives + 1], expiry[lives + 2] = ends, id
      lives = lives + 2
    end
    out[k] = ''
  else
    out[k] = {redis.sha1hex(old), old}
  end
end
done(values)
if lives > 0 then redis.call('ZADD', X, unpack(expiry)) end
-- Else whoever looked has seen to that, just before.
if due or life == '0' then keep() end
out[n + 1], out[n + 2] = head, fresh and 1 or 0
return out
